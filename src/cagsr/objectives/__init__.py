"""Objectives: the losses that an update sums, one a file."""
