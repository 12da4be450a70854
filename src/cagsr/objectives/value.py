"""The clipped value objective of PPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.advantage.whiten import Reduce, masked_moments
from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weight: Tensor, tokens: Tensor, cliprange_value: float
) -> Tensor:
    """Clipped value loss: half the larger of the two squared errors ("The N+ Implementation Details", Huang et al., 2024).

    Args:
        values: ``(batch, response)`` of the value head being trained.
        old_values: ``(batch, response)`` when the answers were sampled.
        returns: ``(batch, response)`` targets.
        weight: ``(batch, response)``, how strongly each token counts; bool or float.
        tokens: scalar, response tokens of the whole mini-batch.
        cliprange_value: how far a value may move from ``old_values`` before its error no longer shrinks.

    Returns:
        Scalar, differentiable.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (errors * weight).sum() / tokens


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> float:
    """Share of the returns' variance that the values explain: ``1 - Var(returns - values) / Var(returns)``.

    Args:
        values: ``(batch, response)``.
        returns: ``(batch, response)``.
        mask: ``(batch, response)`` bool.
        reduce: sums over processes; None for one process.

    Returns:
        At most 1; 0 for constant values, or where the returns have no variance.
    """
    _, _, total = masked_moments(returns, mask, reduce)
    _, _, left = masked_moments(returns - values, mask, reduce)
    return 1.0 - left / total if total > 0.0 else 0.0


@dataclass(frozen=True)
class ValueObjective:
    """:func:`value_loss` of the sampled tokens."""

    coefficient: float
    cliprange: float
    name: str = "value"

    def __call__(self, batch: UpdateBatch) -> ObjectiveLoss:
        """Against the returns that were fixed before the update."""
        assert batch.values is not None
        assert batch.readings.values is not None
        weight, tokens = batch.targets.weights["rl"], batch.total("rl")
        returns = batch.targets.returns
        return ObjectiveLoss(value_loss(batch.values, batch.readings.values, returns, weight, tokens, self.cliprange))
