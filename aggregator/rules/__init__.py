"""How accepted updates become the next model."""
