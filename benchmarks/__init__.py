"""Benchmarks: how much reading the prompt attention costs."""
