"""Parts of your own, outside the package: a reward term with a setting, a task of two turns, an objective."""
