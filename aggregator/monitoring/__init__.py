"""What an operator sees of a running aggregator: log events, metrics, health."""
