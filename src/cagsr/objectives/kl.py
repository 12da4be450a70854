"""The KL to the frozen starting model as a loss."""

from __future__ import annotations

from dataclasses import dataclass

from cagsr.advantage.kl import KLController, kl_k1, kl_k3
from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


@dataclass(frozen=True)
class KLObjective:
    """The KL per token by an estimator, at the weight that the controller holds now."""

    controller: KLController
    estimator: str
    name: str = "kl"
    logged: bool = False  # it is already, as objective/kl

    @property
    def coefficient(self) -> float:
        """The controller's."""
        return self.controller.kl_coef

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """Mean over the sampled tokens."""
        estimate = kl_k3 if self.estimator == "k3" else kl_k1
        return ObjectiveLoss(batch.mean(estimate(batch.logprobs, batch.reference_logprobs), "rl"))
