"""What an objective is: a name, a coefficient, and a loss of one micro-batch; an update sums a list of them.

Every loss is a sum over positions divided by the number (or the weights' sum) of the whole mini-batch's positions over all
processes: then gradient accumulation and the number of processes change nothing. An objective of your own needs no base class::

    class LogProbabilityFloor:
        name = "floor"
        coefficient = 0.1

        def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
            below = (-8.0 - batch.logprobs).clamp(min=0.0)
            return ObjectiveLoss(batch.mean(below, "rl"))

Name it in ``ppo.objectives`` by its dotted path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cagsr.flow import EpisodeBatch, Readings, Targets


@dataclass(frozen=True)
class UpdateBatch:
    """One micro-batch of an update: what the pass gave now, and what was fixed before the first gradient step."""

    episodes: EpisodeBatch
    logprobs: Tensor  # (batch, response) under the policy being trained, differentiable; 0 where no weight is
    entropy: Tensor | None  # (batch, response) likewise; None: no objective needs it
    values: Tensor | None  # (batch, response) differentiable; None: no value head
    readings: Readings  # when the answers were sampled
    reference_logprobs: Tensor  # (batch, response) under the frozen starting model
    targets: Targets
    totals: Mapping[str, Tensor]
    """Kind of weight -> scalar, the sum of these weights over the whole mini-batch, a process's share of it."""

    def mean(self, per_token: Tensor, weights: str) -> Tensor:
        """Sum of a per-token quantity ``(batch, response)`` with these weights, divided by their sum over the whole mini-batch.

        ``weights`` names one of ``targets.weights``; 0 where no position of the mini-batch has one.
        """
        if weights not in self.targets.weights:
            raise ValueError(f"no weights are called {weights!r}; there are {sorted(self.targets.weights)}")
        weight = self.targets.weights[weights]
        return (per_token.masked_fill(weight == 0, 0.0) * weight).sum() / self.total(weights)

    def total(self, weights: str) -> Tensor:
        """What a sum over positions is divided by: never 0, so that a mini-batch without a position has no loss, not NaN."""
        return self.totals[weights].clamp(min=1e-8)


@dataclass(frozen=True)
class ObjectiveLoss:
    """A loss, and what one logs of it as ``loss/<objective>/<name>``: scalars that add up to those of the mini-batch."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """One summand of the loss.

    It may say more of itself: ``needs_entropy``, True where it looks at ``batch.entropy``; ``logged``, False where its loss is
    not to be in the metrics.
    """

    @property
    def name(self) -> str:
        """What its loss is called in the metrics (``loss/<name>_avg``)."""

    @property
    def coefficient(self) -> float:
        """What the loss is multiplied by, now; 0 leaves the objective out."""

    def __call__(self, batch: UpdateBatch, /) -> ObjectiveLoss:
        """The loss of a micro-batch."""
