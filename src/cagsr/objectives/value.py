"""The clipped value objective of PPO."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.advantage.whiten import Reduce, masked_moments
from cagsr.objectives.objective import ObjectiveLoss, UpdateBatch


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weight: Tensor, tokens: Tensor, cliprange_value: float
) -> Tensor:
    """Clipped value loss: half the larger of the two squared errors ("The N+ Implementation Details", Huang et al., 2024).

    All tensors ``(batch, response)`` but the scalar ``tokens``, the response tokens of the whole mini-batch. A value's error no
    longer shrinks once it has moved ``cliprange_value`` from ``old_values``, what it was when the answers were sampled.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (errors * weight).sum() / tokens


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> float:
    """Share of the returns' variance that the values explain: ``1 - Var(returns - values) / Var(returns)``.

    All ``(batch, response)``; ``reduce`` as in :func:`~cagsr.advantage.whiten.masked_moments`. At most 1; 0 for constant values,
    or where the returns have no variance.
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
