"""The vocabulary of both sides. Pure: no I/O, no clock, no threads; imports nothing else of this project."""
