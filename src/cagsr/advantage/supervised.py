"""Supervision and reinforcement in one stage: what a reference answer in a group is worth, and what is imitated."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch, Returns, Targets
from cagsr.reward.pooling import add_at_last_token


def control_reference(returns: Returns, episodes: EpisodeBatch, how: Literal["own", "best", "smooth"]) -> Returns:
    """What the reference answers (``episodes.given``) are paid, so that they pull where the policy has need of them alone.

    own: what the reward says of them. best: at least what the best sampled answer to the prompt is paid. smooth (reward control
    of ViSurf, arXiv 2510.10606): the same, but where a sampled answer is already worth as much as the reference, the mean of the
    sampled ones, so that it is neither better nor worse than they are. The difference is paid at the last token;
    ``contributions`` stay what the terms said.
    """
    given = episodes.given
    if given is None or how == "own":
        return returns
    best, mean = _of_sampled(returns.total, episodes)
    wanted = torch.maximum(returns.total, best)
    if how == "smooth":
        wanted = torch.where(best >= returns.total, mean, wanted)
    more = torch.where(given, wanted - returns.total, 0.0)
    return replace(
        returns,
        total=returns.total + more,
        per_token=add_at_last_token(returns.per_token, more, episodes.sampled),
        by_turn=returns.by_turn + more[:, None],
    )


def imitation_targets(targets: Targets, returns: Returns, episodes: EpisodeBatch, margin: float) -> Targets:
    """Imitate one answer to each prompt: the model's own best where the reward accepts it, else the reference (S3FT,
    arXiv 2502.08130, with the self-reward as its judge).

    An own answer is accepted if it is worth no less than the reference less ``margin`` (in the reward's units). Nothing is
    reinforced: the weights ``rl`` and the advantages become 0.
    """
    given = episodes.given
    if given is None:
        return targets
    best, _ = _of_sampled(returns.total, episodes)
    group = episodes.prompts.group
    reference = torch.zeros_like(returns.total).index_copy(0, group_place(group)[given], returns.total[given])
    place = group_place(group)
    accepted = best >= reference[place] - margin
    # Of several own answers that are best, the first.
    is_best = ~given & (returns.total == best)
    first = torch.full_like(place, len(place)).scatter_reduce(
        0, place, torch.where(is_best, torch.arange(len(place), device=place.device), len(place)), "amin"
    )
    chosen = torch.where(accepted, torch.arange(len(place), device=place.device) == first[place], given)
    weights = {
        **targets.weights,
        "rl": torch.zeros_like(targets.weights["rl"]),
        "ce": (episodes.sampled & chosen[:, None]).float(),
    }
    return replace(targets, advantages=torch.zeros_like(targets.advantages), weights=weights)


def group_place(group: Tensor) -> Tensor:
    """Each row's group, numbered from 0, ``(batch,)`` int64."""
    return torch.unique(group, return_inverse=True)[1]


def _of_sampled(total: Tensor, episodes: EpisodeBatch) -> tuple[Tensor, Tensor]:
    """The best and the mean reward of the sampled answers to each row's prompt, ``(batch,)`` each."""
    assert episodes.given is not None
    place, own = group_place(episodes.prompts.group), ~episodes.given
    lowest = torch.full_like(total, float("-inf"))
    best = lowest.scatter_reduce(0, place, torch.where(own, total, float("-inf")), "amax")
    sums = torch.zeros_like(total).index_add(0, place, torch.where(own, total, 0.0))
    counts = torch.zeros_like(total).index_add(0, place, own.to(total.dtype))
    return best[place], (sums / counts.clamp(min=1.0))[place]
