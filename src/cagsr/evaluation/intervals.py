"""Statistics over prompts and seeds: intervals, paired tests, correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_EXACT = 12
"""Up to so many differences every assignment of signs is gone through (4,096)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, drawn: Floats) -> Interval:
        """A value with the 95 % percentile interval of its resamples."""
        low, high = np.quantile(drawn, [0.025, 0.975])
        return cls(float(value), float(low), float(high))

    def __format__(self, spec: str) -> str:
        """``0.412 [0.380, 0.445]``; ``spec`` as for a single number."""
        mean, low, high = (format(value, spec or ".3f") for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def mean_interval(values: ArrayLike, resamples: int = 2000) -> Interval:
    """Mean of ``values`` with its 95 % percentile bootstrap interval (Efron & Tibshirani, 1993, chapter 13).

    ``values`` is ``(prompts,)`` or ``(seeds, prompts)``. With seeds, each resample draws seeds and prompts, both with
    replacement and the prompts alike for all drawn seeds: the two are crossed, as every seed answers every prompt.

    Raises ValueError for an empty array, more than two dimensions, or a value that is not finite.
    """
    table = _table(values)
    return Interval.of(table.mean(), _resampled_means(table, resamples))


def balanced_interval(strata: Sequence[ArrayLike], resamples: int = 2000) -> Interval:
    """Mean of the means of several strata, each counting as much whatever its size, with its 95 % percentile bootstrap interval.

    Each stratum is ``(values,)`` and resampled within itself. Raises ValueError as ``mean_interval``.
    """
    generator = np.random.default_rng(0)
    means, drawn = [], []
    for stratum in strata:
        (row,) = _table(stratum)
        means.append(row.mean())
        drawn.append(draw_counts(len(row), resamples, generator) @ row / len(row))
    return Interval.of(np.mean(means), np.mean(drawn, axis=0))


def paired_difference(after: ArrayLike, before: ArrayLike) -> Interval:
    """Mean of ``after - before`` with its interval, paired by prompt and, with two dimensions, by seed.

    Shapes as in ``mean_interval``, the same for both. Raises ValueError where they differ.
    """
    return mean_interval(_differences(after, before))


def paired_p_value(after: ArrayLike, before: ArrayLike, resamples: int = 9999) -> float:
    """Two-sided p-value of the mean of ``after - before`` being 0, paired by prompt and, with two dimensions, by seed.

    One dimension, ``(prompts,)``: the sign-flip permutation test (Fisher's randomisation test for pairs), exact up to
    12 prompts, else with ``resamples`` random assignments of signs, ``p = (1 + as extreme) / (1 + resamples)``.

    Two dimensions, ``(seeds, prompts)``: the bootstrap of ``mean_interval``, turned round: twice the smaller share of
    resampled means on either side of 0. A handful of seeds holds little information about their spread, and the bootstrap
    then gives intervals and p-values that are somewhat too small. Raises ValueError for differing shapes and as ``mean_interval``.
    """
    differences = _differences(after, before)
    table = _table(differences)
    if differences.ndim == 2 and len(table) > 1:
        means = _resampled_means(table, resamples)
        smaller = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
        return float(min(1.0, 2 * (1 + smaller) / (1 + resamples)))
    row = table[0]
    # Sums of the same numbers in another order differ in the last digits, and count as equal.
    threshold = abs(row.sum()) - 1e-9 * np.abs(row).sum()
    if len(row) <= _EXACT:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(row))[:, None] >> np.arange(len(row)) & 1)
        return float(np.mean(np.abs(signs @ row) >= threshold))
    flipped = np.random.default_rng(0).integers(0, 2, size=(resamples, len(row)), dtype=np.int8)
    # A part at a time: numpy makes float64 of what it multiplies.
    parts = np.array_split(flipped, max(1, flipped.size // 2**22))
    sums = row.sum() - 2.0 * np.concatenate([part @ row for part in parts])
    return float((1 + np.count_nonzero(np.abs(sums) >= threshold)) / (1 + resamples))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjustment: p-values that hold for the whole family, whatever the dependence.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on; none is smaller than the one before it, none
    above 1. The order of the input is kept. Raises ValueError for a p-value outside [0, 1].
    """
    if not all(0 <= value <= 1 for value in p_values):  # NaN too
        raise ValueError("a p-value lies outside [0, 1]")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def win_rates(scores: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """Share of the pairs of answers to each prompt, one of either model, in which the first scores higher.

    Every answer of the one is held against every answer of the other, whose number may differ; a tie counts half. Both take
    ``(answers,)`` for each prompt. Returns ``(prompts,)`` float64, 0 to 1; NaN where a side has no score that is a number.
    """
    found = np.full(len(scores), np.nan)
    for number, (mine, theirs) in enumerate(zip(scores, others, strict=True)):
        mine, theirs = mine[np.isfinite(mine)], theirs[np.isfinite(theirs)]
        if len(mine) and len(theirs):
            found[number] = np.mean(0.5 * (1 + np.sign(mine[:, None] - theirs[None, :])))
    return found


def _differences(after: ArrayLike, before: ArrayLike) -> Floats:
    first, second = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values need one shape, got {first.shape} and {second.shape}")
    return first - second


def _table(values: ArrayLike) -> Floats:
    """``(seeds, prompts)``, checked."""
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected values of shape (prompts,) or (seeds, prompts), got {np.shape(values)}")
    if not np.isfinite(table).all():
        raise ValueError("a value is not finite; leave the prompt out for both sides of a comparison")
    return table


def draw_counts(items: int, resamples: int, generator: np.random.Generator | None = None) -> NDArray[np.int64]:
    """How often each item is drawn in each bootstrap resample, ``(resamples, items)``: a resample's mean is then one product."""
    return (generator or np.random.default_rng(0)).multinomial(items, np.full(items, 1 / items), size=resamples)


def _resampled_means(table: Floats, resamples: int) -> Floats:
    """Means ``(resamples,)`` of seeds and prompts drawn with replacement."""
    seeds, prompts = table.shape
    seed_counts, prompt_counts = _drawn(seeds, prompts, resamples)
    return np.einsum("rs,sp,rp->r", seed_counts, table, prompt_counts, optimize=True) / (seeds * prompts)


@lru_cache(maxsize=4)
def _drawn(seeds: int, prompts: int, resamples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each seed and prompt is drawn: always the same, and drawing takes most of the time that a report takes."""
    generator = np.random.default_rng(0)
    return draw_counts(seeds, resamples, generator), draw_counts(prompts, resamples, generator)
