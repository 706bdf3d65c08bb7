"""Local training: the plan of a round, run step by step on a backend."""
