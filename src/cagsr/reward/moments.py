"""Running moments of a reward term over the answers of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
