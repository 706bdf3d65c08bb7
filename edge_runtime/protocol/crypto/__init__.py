"""Keys, signatures, sealed messages and random streams: the only room that imports ``cryptography``."""
