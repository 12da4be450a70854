"""Worked examples on real data; run them from the repository's root, as ``python -m examples.e2e.prepare``."""
