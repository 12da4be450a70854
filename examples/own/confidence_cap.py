"""An objective: tokens that are all but certain already are pulled back, so that the policy does not sharpen for its own sake.

cagsr train ... --ppo.objectives examples.own.confidence_cap.ConfidenceCap
"""

from __future__ import annotations

from dataclasses import dataclass

from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


@dataclass(frozen=True)
class ConfidenceCap:
    """How far log-probabilities lie above a cap, mean over the sampled tokens, nats."""

    cap: float = -0.05
    coefficient: float = 0.1
    name: str = "confidence"

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """0 where no token is likelier than ``exp(cap)``."""
        return ObjectiveLoss(batch.mean((batch.logprobs - self.cap).clamp(min=0.0), "rl"))
