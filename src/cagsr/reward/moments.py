"""Running moments of a reward term over the answers of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of all values seen (Welford, 1962; Chan, Golub & LeVeque, 1979)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def merge(self, count: float, mean: float, m2: float) -> None:
        """Add a group of values, given by its count, mean and sum of squared deviations from that mean.

        The order of the groups, and how the values were cut into groups, changes nothing but rounding.
        """
        if count == 0:
            return
        both = self.count + count
        shift = mean - self.mean
        self.m2 += m2 + shift * shift * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    @property
    def std(self) -> float:
        """Standard deviation of all values seen (dividing by their number); 0 before the first."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    @property
    def constant(self) -> bool:
        """The values do not vary beyond float32 rounding: dividing by their deviation would blow up noise."""
        return self.std <= 1e-6 * abs(self.mean) + 1e-8


def group_deviations(values: Tensor, applies: Tensor, group: Tensor) -> tuple[Tensor, float]:
    """Deviation of each value from the mean of its group, over the values that apply.

    Args:
        values: ``(batch,)``.
        applies: ``(batch,)`` bool; values that do not apply are in no mean.
        group: ``(batch,)`` int64, answers to the same prompt have the same number.

    Returns:
        ``(batch,)`` float64 on the CPU, 0 where the value does not apply, and the degrees of freedom: values that apply
        less groups that have any.
    """
    known, own = applies.cpu(), torch.unique(group.cpu(), return_inverse=True)[1]
    x = torch.where(known, values.cpu().double(), 0.0)
    size = int(own.max()) + 1 if len(own) else 0
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, own, known.double())
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, own, x)
    deviation = torch.where(known, x - (total / count.clamp(min=1))[own], 0.0)
    return deviation, float(known.sum() - (count > 0).sum())
