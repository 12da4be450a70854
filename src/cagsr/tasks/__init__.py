"""Tasks: what follows an answer, and in which order prompts are met."""
