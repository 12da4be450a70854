"""From the reward to advantages: penalties on tokens, then one of three estimators."""

import torch
from torch import Tensor

from cagsr.advantage.gae import generalized_advantages
from cagsr.advantage.group import group_z_scores, leave_one_out
from cagsr.advantage.kl import kl_estimate
from cagsr.advantage.whiten import VARIANCE_EPS, Reduce, masked_moments, unit_scale, whiten
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError
from cagsr.flow import EpisodeBatch, Readings, Returns, Targets
from cagsr.reward.pooling import add_at_last_token


def estimate_targets(
    config: PPOConfig,
    returns: Returns,
    episodes: EpisodeBatch,
    readings: Readings,
    reference_logprobs: Tensor,
    kl_coef: float,
    reduce: Reduce | None = None,
) -> Targets:
    """Estimate how much better each token was than expected.

    1. Token rewards: ``returns.per_token``, less ``missing_eos_penalty`` at the last token of answers that were cut,
       less ``kl_coef`` (the controller's) times the KL per token if ``kl_in`` is ``reward``.
    2. ``gae``: generalised advantages on the token rewards and the value estimates; tokens that were not sampled are
       skipped. ``rloo`` and ``grpo``: the sum of the token rewards from an answer on, against those of the other answers
       in the same turn of the same prompt; the same on all of the answer's tokens. What a later turn earns counts
       ``turn_discount`` for each turn between: ``G(t) = sum_{u >= t} turn_discount^(u - t) R(u)`` (arXiv 2506.11108).
    3. ``whiten_advantages``: gae to mean 0 and deviation 1 over sampled tokens; the group estimators, which are
       centred within each group, are only divided by their deviation.

    ``whiten_rewards`` divides token rewards (gae) or the sums (rloo, grpo) by their deviation and keeps their mean.
    ``reduce`` sums a small tensor over processes; None for one process.

    Gives advantages and returns, ``(batch, response)`` float32 without gradient, 0 where nothing was sampled; every sampled
    position takes part in the objectives of reinforcement, none in imitation. ConfigError: gae without value estimates, or
    rloo with a single answer to a prompt.
    """
    mask = episodes.sampled
    cut = ~episodes.ended if episodes.given is None else ~episodes.ended & ~episodes.given  # a reference was cut by us
    penalty = cut.float() * (config.missing_eos_penalty or 0.0)
    tokens = add_at_last_token(torch.where(mask, returns.per_token.detach().float(), 0.0), -penalty, mask)
    if config.kl_in == "reward":
        # Masked before the subtraction: padding may hold infinities, and inf - inf would be NaN.
        policy, frozen = (
            torch.where(mask, found.detach().float(), 0.0) for found in (readings.logprobs, reference_logprobs)
        )
        tokens = tokens - kl_coef * kl_estimate(config.kl_estimator, policy, frozen)
    weights = {"rl": mask.float(), "ce": torch.zeros_like(tokens)}
    if config.estimator == "gae":
        if readings.values is None:
            raise ConfigError(
                "ppo.estimator gae needs value estimates, but the model has no value head: use rloo or grpo"
            )
        if config.whiten_rewards:
            tokens = whiten(tokens, mask, shift_mean=False, reduce=reduce)
        advantages, targets = generalized_advantages(
            tokens, readings.values.detach(), mask, config.gamma, config.lam, episodes.turn, config.turn_discount
        )
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=reduce)
        return Targets(advantages, targets, weights)
    compare = leave_one_out if config.estimator == "rloo" else group_z_scores
    advantages = torch.zeros_like(tokens)
    for turn in range(1 + int(torch.where(mask, episodes.turn, 0).max())):
        own = mask & (episodes.turn == turn)
        # Of later turns only episodes that came so far; an answer without tokens is compared all the same.
        there = own.any(dim=1) | (turn == 0)
        since = episodes.turn - turn
        discount = config.turn_discount ** since.clamp(min=0)
        ahead = torch.where(since >= 0, tokens * discount, 0.0).sum(dim=1)
        # An answer without tokens has no place to be paid at, but the others are still compared with what it is worth.
        sums = torch.where(mask.any(dim=1), ahead, returns.total.detach().float() - penalty)
        if config.whiten_rewards and turn == 0:
            _, _, variance = masked_moments(sums, there, reduce)
            sums = whiten(sums, there, shift_mean=False, reduce=reduce)
        elif config.whiten_rewards:
            # By the deviation of whole episodes: processes differ in their turns, so none may wait for the others here.
            sums = sums * (variance + VARIANCE_EPS) ** -0.5
        group = episodes.prompts.group[there]
        if turn > 0:
            _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
            kept = count[index] > 1  # there is another one to be compared with
            there, group = there.nonzero()[:, 0][kept], group[kept]
        found = tokens.new_zeros(len(tokens))
        found[there] = compare(sums[there], group)
        advantages = torch.where(own, found[:, None], advantages)
    if config.whiten_advantages:
        advantages = unit_scale(advantages, mask, reduce=reduce)
    return Targets(advantages, torch.zeros_like(advantages), weights)
