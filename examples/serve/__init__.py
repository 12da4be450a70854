"""A server that learns from one user's prompts."""
