"""What was accepted, once: an append-only journal and the tables that follow from it, one transaction per batch."""
