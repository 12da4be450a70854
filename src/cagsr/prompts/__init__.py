"""Prompts: read, encode, decide which words matter."""
