"""The demo: ten real device processes train one model over a real broker."""
