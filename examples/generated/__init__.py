"""Generated tasks on which a small model learns in minutes: chains of thought, code, conversations."""
