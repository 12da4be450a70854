"""Attention: read from response tokens to prompt tokens during an ordinary forward pass."""
