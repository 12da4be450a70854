"""Reward: terms as pure functions over named tensors, and their weighted sum."""
