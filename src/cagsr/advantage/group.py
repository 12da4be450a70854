"""Advantages without a value function: an answer against the other answers to the same prompt."""

import torch
from torch import Tensor

from cagsr.errors import ConfigError

STD_EPS = 1e-4
"""Added to a group's standard deviation, as TRL does: groups of (nearly) equal rewards give (nearly) 0."""
ROUNDING = 1e-6
"""Spread, relative to the largest reward of the group (at least 1), that is float32 rounding of sums."""


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """Reward minus the mean of the group's other rewards (RLOO; Ahmadian et al., 2024, arXiv 2402.14740, section 3.2).

    ``(batch,)`` float32 of rewards ``(batch,)`` and ``group`` ``(batch,)`` int64, equal for answers to the same prompt, in any
    order. A group of one answer, which has nothing to be compared with, is a ConfigError.
    """
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ConfigError(
            "ppo.estimator rloo compares each answer with the others to its prompt, but a prompt has only one: set "
            "sampling.num_generations to 2 or more, or use the estimator gae"
        )
    n = size[index].float()
    return _centred(rewards.float(), index, size) * n / (n - 1)


def group_z_scores(rewards: Tensor, group: Tensor) -> Tensor:
    """Z-scores within the group (GRPO; Shao et al., 2024, arXiv 2402.03300, section 4.1); arguments as :func:`leave_one_out`.

    ``(r - mean) / (std + 1e-4)`` with the standard deviation of a sample (n - 1), as in TRL. A group whose rewards differ
    by no more than float32 rounding gets 0 throughout (divided by 1e-4 the rounding would be trained on), and so does a group
    of one, whose only answer is neither better nor worse than the others.
    """
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    deviation = _centred(rewards.float(), index, size)
    squares = torch.zeros_like(size, dtype=torch.float32).scatter_add(0, index, deviation.square())
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    size_of_rewards = torch.zeros_like(std).scatter_reduce(0, index, rewards.float().abs(), "amax")
    told_apart = std > ROUNDING * size_of_rewards.clamp(min=1.0)
    return torch.where(told_apart[index], deviation / (std[index] + STD_EPS), 0.0)


def _centred(rewards: Tensor, index: Tensor, size: Tensor) -> Tensor:
    mean = torch.zeros_like(size, dtype=torch.float32).scatter_add(0, index, rewards) / size
    return rewards - mean[index]
