"""The server side: opens rounds, stores updates durably, sums them exactly once, publishes versions."""
