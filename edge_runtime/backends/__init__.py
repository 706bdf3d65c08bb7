"""Who runs the graphs of an artifact on this machine."""
