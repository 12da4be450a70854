"""Reward: terms as pure functions over named tensors, and their weighted sum.

The formulas are in ``coverage``, ``focus``, ``repetition``, ``certainty`` and ``length``; ``terms`` binds them to
their settings, ``functions`` and ``model`` bring in a user's own; ``combine`` normalises, weighs and sums; ``build``
makes all of it from the config.
"""
