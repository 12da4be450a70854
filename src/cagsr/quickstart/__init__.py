"""Quickstart: an instruction task that is generated and can be checked, and a small model that half knows it."""
