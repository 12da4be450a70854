"""Runs: the run folder, checkpoints, trackers and the model card."""
