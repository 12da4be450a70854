"""cagsr: reinforcement learning for language models whose reward comes from the model's own attention."""

__version__ = "0.1.0"
