"""The device side: trains exported graphs on local data and speaks the fleetgrad protocol."""
