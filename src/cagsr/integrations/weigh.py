"""Weigh raw values that were read elsewhere: as they are, or on a running scale as in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cagsr.flow import Prompt, PromptBatch, Reward, RewardBatch, Rollout, Scores
from cagsr.reward.combine import RewardFunction
from cagsr.reward.protocol import Partial


def weighted_sum(raw: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """``(answers,)`` weight times raw value, summed over the terms; a term that does not apply counts 0."""
    return torch.stack([weights[name] * values.nan_to_num(nan=0.0) for name, values in raw.items()]).sum(dim=0)


class RunningWeights:
    """Weighs raw values that were read elsewhere as training does: one scale for each term over the run.

    It is :class:`cagsr.reward.combine.RewardFunction` with terms that are already known, so that the answers to one prompt
    can be brought together from several processes first.

    Args:
        weights: name -> weight.
        normalize: as ``reward.normalize``.
        clip: as ``reward.clip``.
    """

    def __init__(
        self, weights: Mapping[str, float], normalize: Literal["within_prompt", "running", "none"], clip: float
    ) -> None:
        self._given = [_Given(name) for name in weights]
        self.function = RewardFunction(self._given, list(weights.values()), normalize, clip)

    def __call__(self, raw: Mapping[str, Tensor], group: Tensor) -> Reward:
        """Take the values into the running scale and weigh them.

        Args:
            raw: name -> ``(answers,)``, NaN where a term does not apply.
            group: ``(answers,)`` int64, equal for answers to one prompt.

        Raises:
            ConfigError: ``within_prompt`` and no prompt has two answers.
        """
        for term in self._given:
            term.values = raw[term.name]
        return self.function(_only_groups(group))


class _Given:
    """A term whose values are known."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = torch.zeros(0)

    def __call__(self, batch: RewardBatch) -> Partial:
        applies = torch.isfinite(self.values)
        return Partial(torch.where(applies, self.values, 0.0), applies)


def _only_groups(group: Tensor) -> RewardBatch:
    """A batch of which only the groups matter: what a reward function asks for beside its terms' values."""
    count = len(group)
    zeros, ones = torch.zeros(count, 1), torch.ones(count, 1, dtype=torch.bool)
    ids = zeros.long()
    prompts = PromptBatch((Prompt(0, ""),) * count, ids, ones, ids - 1, zeros, group)
    rollout = Rollout(prompts, ids, ones, ones[:, 0], ("",) * count)
    return RewardBatch(rollout, Scores(zeros, zeros, zeros, zeros), None, None, None)
