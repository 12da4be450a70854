"""PPO's losses as pure functions of one (micro-)batch.

Every loss is a sum over response tokens divided by ``tokens``, the number of response tokens of the whole mini-batch
over all processes: then gradient accumulation and the number of processes change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.advantage.whiten import Reduce, masked_moments

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss and what one logs of it (sums over tokens, to be divided by their number)."""

    loss: Tensor  # scalar, differentiable
    ratio: Tensor  # (batch, response) detached
    clipped: Tensor  # scalar: tokens where the clipped branch was the worse
    approx_kl: Tensor  # scalar: sum over tokens of (ratio - 1) - log ratio


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    tokens: Tensor,
    cliprange: float,
    correction: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate objective (Schulman et al., 2017, equation 7), as a loss.

    Args:
        logprobs: ``(batch, response)`` under the policy being trained.
        old_logprobs: ``(batch, response)`` when the answers were sampled.
        advantages: ``(batch, response)``.
        mask: ``(batch, response)`` bool.
        tokens: scalar, response tokens of the whole mini-batch.
        cliprange: epsilon.
        correction: ``(batch, response)`` log policy - log sampler; each token is weighted by its exponential.

    Returns:
        ``max(-A r, -A clip(r, 1 - eps, 1 + eps))``, summed over tokens and divided by ``tokens``, with statistics.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_ratio = log_ratio.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    per_token = torch.maximum(plain, clipped)
    if correction is not None:
        per_token = per_token * correction.exp()
    with torch.no_grad():
        clip_count = ((clipped > plain) & mask).sum()
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum()
    return PolicyLoss((per_token * mask).sum() / tokens, ratio.detach(), clip_count, approx_kl)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, tokens: Tensor, cliprange_value: float
) -> Tensor:
    """Clipped value loss: half the larger of the two squared errors ("The N+ Implementation Details", Huang et al., 2024).

    Args:
        values: ``(batch, response)`` of the value head being trained.
        old_values: ``(batch, response)`` when the answers were sampled.
        returns: ``(batch, response)`` targets.
        mask: ``(batch, response)`` bool.
        tokens: scalar, response tokens of the whole mini-batch.
        cliprange_value: how far a value may move from ``old_values`` before its error no longer shrinks.

    Returns:
        Scalar, differentiable.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (errors * mask).sum() / tokens


def masked_sum_loss(per_token: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Sum of a per-token quantity over response tokens, divided by the mini-batch's number of them.

    Args:
        per_token: ``(batch, response)``, the KL penalty or the entropy.
        mask: ``(batch, response)`` bool.
        tokens: scalar.

    Returns:
        Scalar, differentiable.
    """
    return per_token.masked_fill(~mask, 0.0).sum() / tokens


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> float:
    """Share of the returns' variance that the values explain: ``1 - Var(returns - values) / Var(returns)``.

    Args:
        values: ``(batch, response)``.
        returns: ``(batch, response)``.
        mask: ``(batch, response)`` bool.
        reduce: sums over processes; None for one process.

    Returns:
        At most 1; 0 for constant values, or where the returns have no variance.
    """
    _, _, total = masked_moments(returns, mask, reduce)
    _, _, left = masked_moments(returns - values, mask, reduce)
    return 1.0 - left / total if total > 0.0 else 0.0
