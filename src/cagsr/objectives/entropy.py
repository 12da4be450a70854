"""The entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


@dataclass(frozen=True)
class EntropyObjective:
    """Mean entropy of the next-token distributions; a negative coefficient pays for it."""

    coefficient: float
    name: str = "entropy"
    logged: bool = False  # it is already, as policy/entropy_avg
    needs_entropy: bool = True

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """Mean over the sampled tokens."""
        assert batch.entropy is not None
        return ObjectiveLoss(batch.mean(batch.entropy, "rl"))
