"""Attention: read from response tokens to prompt tokens during an ordinary forward pass."""

from cagsr.attention.reader import PromptAttentionReader, Reading
from cagsr.attention.region import AttentionRegion, chosen_columns

__all__ = ["AttentionRegion", "PromptAttentionReader", "Reading", "chosen_columns"]
