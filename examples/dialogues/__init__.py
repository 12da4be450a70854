"""Task-oriented dialogues: a reward that sees the history, on domains that were not trained on."""
