"""Training: the loop, and what one step of it does."""
