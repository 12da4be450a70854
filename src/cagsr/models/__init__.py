"""Models: load a policy, its value head and its frozen reference."""
