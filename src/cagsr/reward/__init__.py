"""Reward: terms as pure functions over named tensors, and their weighted sum.

Each file of ``terms`` is a term: its formula and its settings, which ``registry`` makes known. ``user_functions`` and ``model``
bring in a user's own; ``function`` normalises, weighs and sums; ``build`` makes all of it from the config.
"""
