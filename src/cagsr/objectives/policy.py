"""The clipped policy objective of PPO."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.advantage.kl import LOG_RATIO_LIMIT
from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss and what one logs of it (sums over tokens, to be divided by their number)."""

    loss: Tensor  # scalar, differentiable
    ratio: Tensor  # (batch, response) detached
    clipped: Tensor  # scalar: tokens (their weights' sum) where the clipped branch was the worse
    approx_kl: Tensor  # scalar: sum over tokens of (ratio - 1) - log ratio


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cliprange: float,
    correction: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate objective (Schulman et al., 2017, equation 7), as a loss.

    ``max(-A r, -A clip(r, 1 - eps, 1 + eps))``, weighted, summed and divided by the scalar ``tokens``, the response tokens
    (their weights' sum) of the whole mini-batch; with statistics. All else is ``(batch, response)``: ``old_logprobs`` are
    those when the answers were sampled, ``weight``, bool or float, says how strongly each token counts, and ``correction``,
    log policy - log sampler, weighs it by its exponential.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_ratio = log_ratio.masked_fill(weight == 0, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    per_token = torch.maximum(plain, clipped)
    if correction is not None:
        per_token = per_token * correction.exp()
    with torch.no_grad():
        clip_count = ((clipped > plain) * weight).sum()
        approx_kl = ((ratio - 1 - log_ratio) * weight).sum()
    return PolicyLoss((per_token * weight).sum() / tokens, ratio.detach(), clip_count, approx_kl)


@dataclass(frozen=True)
class PolicyObjective:
    """:func:`policy_loss` of the sampled tokens."""

    cliprange: float
    name: str = "policy"
    coefficient: float = 1.0

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """With the ratio, the share of clipped tokens and the KL to the policy before the update."""
        weight, tokens = batch.targets.weights["rl"], batch.total("rl")
        advantages, old = batch.targets.advantages, batch.readings
        found = policy_loss(
            batch.logprobs, old.logprobs, advantages, weight, tokens, self.cliprange, old.sampling_correction
        )
        metrics = {
            "ratio": (found.ratio * weight).sum() / tokens,
            "clipped": found.clipped / tokens,
            "approx_kl": found.approx_kl / tokens,
        }
        return ObjectiveLoss(found.loss, metrics)
