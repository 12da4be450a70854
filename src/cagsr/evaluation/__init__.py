"""Evaluation: metrics, monitors and diagnosis of a reward."""
