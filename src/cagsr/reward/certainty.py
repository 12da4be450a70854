"""Self-certainty: how far the next-token distributions are from uniform (Intuitor, arXiv 2505.19590)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def self_certainty(logits: Tensor) -> Tensor:
    """KL(U || p) of the softmax p of the logits, U uniform over the vocabulary.

    ``KL(U || p) = -log V - mean_v log p_v`` (arXiv 2505.19590, equation 5).

    Args:
        logits: ``(..., vocab)``, any floating dtype, all finite.

    Returns:
        ``(...)`` float32 >= 0, nats.
    """
    return certainty_of(logits.float().log_softmax(dim=-1))


def certainty_of(logprobs: Tensor) -> Tensor:
    """The same of log-probabilities, ``(..., vocab)`` float32, all finite: ``-mean_v log p_v - log V``, ``(...)``."""
    certainty = -logprobs.mean(dim=-1) - math.log(logprobs.shape[-1])
    return certainty.clamp(min=0.0)  # Rounding can push a uniform distribution below 0.


def mean_certainty(certainty: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``(batch, response)`` certainties over real tokens, ``(batch,)`` float32; 0 for an answer of no token."""
    return torch.where(mask, certainty.float(), 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
