"""From the reward to advantages: penalties on tokens, then one of three estimators."""

from __future__ import annotations

import torch
from torch import Tensor

from cagsr.advantage.gae import generalized_advantages
from cagsr.advantage.group import group_z_scores, leave_one_out
from cagsr.advantage.kl import kl_k1, kl_k3
from cagsr.advantage.whiten import Reduce, unit_scale, whiten
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError
from cagsr.flow import Advantages, Reward, Rollout, Scores
from cagsr.reward.pay import add_at_last_token


def estimate_advantages(
    config: PPOConfig,
    reward: Reward,
    rollout: Rollout,
    scores: Scores,
    reference_logprobs: Tensor,
    kl_coef: float,
    reduce: Reduce | None = None,
) -> Advantages:
    """Estimate how much better each token was than expected.

    1. Token rewards: ``reward.per_token``, less ``missing_eos_penalty`` at the last token of answers that were cut,
       less ``kl_coef`` times the KL per token if ``kl_in`` is ``reward``.
    2. ``gae``: generalised advantages on the token rewards and the value estimates. ``rloo`` and ``grpo``: the sum of
       an answer's token rewards against the other answers to its prompt, the same on all of its tokens.
    3. ``whiten_advantages``: gae to mean 0 and deviation 1 over response tokens; the group estimators, which are
       centred within each group, are only divided by their deviation.

    ``whiten_rewards`` divides token rewards (gae) or the sums (rloo, grpo) by their deviation and keeps their mean.

    Args:
        config: estimator and coefficients.
        reward: the reward of each answer.
        rollout: the answers.
        scores: log-probabilities and values at the time of sampling.
        reference_logprobs: ``(batch, response)`` under the frozen starting model.
        kl_coef: weight of the KL now (the controller's).
        reduce: sums a small tensor over processes; None for one process.

    Returns:
        Advantages and returns, ``(batch, response)`` float32 without gradient, 0 on masked tokens.

    Raises:
        ConfigError: gae without value estimates, or rloo with a single answer to a prompt.
    """
    mask = rollout.response_mask
    penalty = sequence_penalty(config, rollout)
    tokens = add_at_last_token(torch.where(mask, reward.per_token.detach().float(), 0.0), -penalty, mask)
    if config.kl_in == "reward":
        tokens = tokens - kl_coef * kl_per_token(config, scores.logprobs, reference_logprobs, mask)
    if config.estimator == "gae":
        if scores.values is None:
            raise ConfigError(
                "ppo.estimator gae needs value estimates, but the model has no value head: use rloo or grpo"
            )
        if config.whiten_rewards:
            tokens = whiten(tokens, mask, shift_mean=False, reduce=reduce)
        advantages, returns = generalized_advantages(tokens, scores.values.detach(), mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=reduce)
        return Advantages(advantages=advantages, returns=returns)
    # An answer without tokens has no place to be paid at, but the others are still compared with what it is worth.
    sums = torch.where(mask.any(dim=1), tokens.sum(dim=1), reward.total.detach().float() - penalty)
    if config.whiten_rewards:
        sums = whiten(sums, torch.ones_like(sums, dtype=torch.bool), shift_mean=False, reduce=reduce)
    compare = leave_one_out if config.estimator == "rloo" else group_z_scores
    advantages = torch.where(mask, compare(sums, rollout.prompts.group)[:, None], 0.0)
    if config.whiten_advantages:
        advantages = unit_scale(advantages, mask, reduce=reduce)
    return Advantages(advantages=advantages, returns=torch.zeros_like(advantages))


def sequence_penalty(config: PPOConfig, rollout: Rollout) -> Tensor:
    """Charge answers that did not stop by themselves, ``(batch,)`` float32."""
    return (~rollout.ended).float() * (config.missing_eos_penalty or 0.0)


def kl_per_token(config: PPOConfig, logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """KL to the reference by the configured estimator, ``(batch, response)`` float32, detached, 0 on masked tokens."""
    estimator = kl_k1 if config.kl_estimator == "k1" else kl_k3
    zeros = torch.zeros_like(logprobs, dtype=torch.float32)
    # Masked before the subtraction: padding may hold infinities, and inf - inf would be NaN.
    return estimator(
        torch.where(mask, logprobs.detach().float(), zeros), torch.where(mask, reference.float(), zeros)
    ).detach()
