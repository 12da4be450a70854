"""Imitation: the cross-entropy of the tokens that somebody marked to be learned as they are."""

from __future__ import annotations

from dataclasses import dataclass

from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


@dataclass(frozen=True)
class CrossEntropyObjective:
    """Mean negative log-probability of the positions with a weight ``ce``."""

    coefficient: float
    name: str = "ce"

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """0 where no position of the mini-batch is marked."""
        return ObjectiveLoss(batch.mean(-batch.logprobs, "ce"))
