"""Length: how many tokens an answer has."""

from __future__ import annotations

from torch import Tensor


def length(mask: Tensor, target: int | None = None) -> Tensor:
    """Count the real tokens, the stop token included, or take the distance from a target.

    Args:
        mask: ``(batch, response)`` bool, real response tokens.
        target: length to compare with, in tokens; None for the length itself.

    Returns:
        ``(batch,)`` float32, tokens.
    """
    tokens = mask.sum(dim=1).float()
    return tokens if target is None else (tokens - target).abs()
