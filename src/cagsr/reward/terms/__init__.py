"""The built-in terms, one a file: the formula, its settings, what it needs."""
