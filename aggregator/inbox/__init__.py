"""Update pieces on disk before anything is acknowledged: append, one sync for the batch, read back verified."""
