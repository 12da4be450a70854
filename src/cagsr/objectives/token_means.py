"""Objectives that are the mean of a quantity of each token: entropy, KL to the starting model, cross-entropy."""

from dataclasses import dataclass

from cagsr.advantage.kl import KLController, kl_estimate
from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


@dataclass(frozen=True)
class EntropyObjective:
    """Mean entropy of the next-token distributions of the sampled tokens; a negative coefficient pays for it."""

    coefficient: float
    name: str = "entropy"
    logged: bool = False  # it is already, as policy/entropy_avg
    needs_entropy: bool = True

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """Mean over the sampled tokens."""
        assert batch.entropy is not None
        return ObjectiveLoss(batch.mean(batch.entropy, "rl"))


@dataclass(frozen=True)
class KLObjective:
    """The KL per sampled token by an estimator, at the weight that the controller holds now."""

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
        estimate = kl_estimate(self.estimator, batch.logprobs, batch.reference_logprobs)
        return ObjectiveLoss(batch.mean(estimate, "rl"))


@dataclass(frozen=True)
class CrossEntropyObjective:
    """Imitation: mean negative log-probability of the positions with a weight ``ce``; 0 where none is marked."""

    coefficient: float
    name: str = "ce"

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """Mean over the marked positions."""
        return ObjectiveLoss(batch.mean(-batch.logprobs, "ce"))
