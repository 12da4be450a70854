"""Where a sequence-level amount is paid: at the last real token, never on padding."""

from __future__ import annotations

import torch
from torch import Tensor


def add_at_last_token(tokens: Tensor, amount: Tensor, mask: Tensor) -> Tensor:
    """Add an amount per sequence to its last real token.

    Args:
        tokens: ``(batch, response)`` amounts per token.
        amount: ``(batch,)``.
        mask: ``(batch, response)`` bool, real response tokens.

    Returns:
        A new ``(batch, response)`` tensor; sequences without a real token are unchanged.
    """
    if mask.shape[1] == 0:
        return tokens.clone()
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (position * mask).argmax(dim=1)
    paid = torch.where(mask.any(dim=1), amount, torch.zeros_like(amount))
    return tokens.scatter_add(1, last[:, None], paid.to(tokens.dtype)[:, None])
