"""The round as a value: ``step(state, now, event)`` gives records to commit and effects to run after the commit."""
