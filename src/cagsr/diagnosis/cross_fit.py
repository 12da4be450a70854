"""Which layers and threshold are the best of a hundred, and what a choice is worth: made on some prompts, judged on others.

The choice is made again and again without a tenth of the prompts, and what it gives on that tenth is put together to one signal
that owes nothing to luck (cross-fitting). All arrays are ``(prompts, candidates)`` float64. The statistic is the correlation with
the truth within the answers to one prompt, *with length held fixed*: whatever grows with length seems to see the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cagsr.diagnosis.signals import Setting, Signals
from cagsr.evaluation.intervals import Floats, Interval, draw_counts

Index = NDArray[np.int64]

FOLDS = 10
_NOISE = 1e-9
"""Share of a variance below which what is left of it is rounding."""


def centred(values: ArrayLike) -> Floats:
    """Take each prompt's mean off, the last axis being its answers; NaN (does not apply) and rounding become 0."""
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
    deviation = np.where(known, x - np.where(known, x, 0.0).sum(axis=-1, keepdims=True) / count, 0.0)
    return np.where(np.abs(deviation) > 1e-6 * np.abs(np.where(known, x, 0.0)), deviation, 0.0)


@dataclass(frozen=True)
class Products:
    """Sums of products of signals, truth and length within each prompt: all that correlations are made of."""

    xx: Floats  # (signals, prompts)
    xy: Floats
    xz: Floats
    yy: Floats  # (prompts,)
    yz: Floats
    zz: Floats

    @classmethod
    def of(cls, signals: Sequence[ArrayLike], truth: ArrayLike, length: ArrayLike) -> Products:
        """Of several signals, all arrays ``(prompts, candidates)``."""
        x, y, z = np.stack([centred(one) for one in signals]), centred(truth), centred(length)
        pairs = ((x, x), (x, y), (x, z), (y, y), (y, z), (z, z))
        return cls(*((one * other).sum(axis=-1) for one, other in pairs))

    def correlations(self, counts: Floats, *, hold_length: bool) -> Floats:
        """Correlation of each signal with the truth within prompts, ``(draws, signals)``; 0 where either does not vary.

        ``counts`` is ``(draws, prompts)``, how often each prompt counts. ``hold_length``: the part of both that is linear in
        length is taken off first.
        """
        xx, xy, xz = (counts @ sums.T for sums in (self.xx, self.xy, self.xz))
        yy, yz, zz = ((counts @ sums)[:, None] for sums in (self.yy, self.yz, self.zz))
        left_x, left_y, left = xx, yy, xy
        if hold_length:
            safe = np.where(zz > 0, zz, 1.0)
            left_x, left_y, left = xx - xz * xz / safe, yy - yz * yz / safe, xy - xz * yz / safe
        varies = (left_x > _NOISE * xx) & (left_y > _NOISE * yy)
        return np.where(varies, left / np.sqrt(np.where(varies, left_x * left_y, 1.0)), 0.0).clip(-1.0, 1.0)


def held_fixed(signal: ArrayLike, truth: ArrayLike, length: ArrayLike) -> float:
    """Correlation of a signal with the truth within prompts, length held fixed; 0 where either does not vary then."""
    products = Products.of([signal], truth, length)
    return float(products.correlations(np.ones((1, len(products.yy))), hold_length=True)[0, 0])


@dataclass(frozen=True)
class FoldComparison:
    """Two signals on the same answers: correlation with the truth within prompts, length held fixed, 95 % intervals."""

    new: Interval
    old: Interval
    difference: Interval


def compare(new: ArrayLike, old: ArrayLike, truth: ArrayLike, length: ArrayLike) -> FoldComparison:
    """Compare two signals; the percentile bootstrap draws prompts, the same for both."""
    products = Products.of([new, old], truth, length)
    prompts = len(products.yy)
    new_all, old_all = products.correlations(np.ones((1, prompts)), hold_length=True)[0]
    drawn = products.correlations(draw_counts(prompts, 2000).astype(np.float64), hold_length=True)
    return FoldComparison(
        Interval.of(new_all, drawn[:, 0]),
        Interval.of(old_all, drawn[:, 1]),
        Interval.of(new_all - old_all, drawn[:, 0] - drawn[:, 1]),
    )


def folds(prompts: int) -> list[tuple[Index, Index]]:
    """Divide prompts (two or more, else ValueError) at random: for each part (the others, the part), as sorted indices."""
    if prompts < 2:
        raise ValueError("two prompts or more can be divided")
    order = np.random.default_rng(0).permutation(prompts)
    parts = [np.sort(part) for part in np.array_split(order, min(FOLDS, prompts))]
    return [(np.setdiff1d(np.arange(prompts), part), part) for part in parts]


def cross_fitted(shape: tuple[int, ...], chosen: Callable[[Index, Index], Floats]) -> Floats:
    """A signal of ``(prompts, candidates)`` whose values at each prompt were chosen without that prompt.

    ``chosen`` chooses on the prompts of its first argument and gives the values at those of its second, ``(part,
    candidates)``, on a scale that is the same for every choice.
    """
    found = np.zeros(shape)
    for others, part in folds(shape[0]):
        found[part] = chosen(others, part)
    return found


@dataclass(frozen=True)
class SettingChoice:
    """What was chosen, and why."""

    setting: Setting
    best: Setting
    """The best of the table; chosen only if it is better than the configured one beyond luck."""
    candidates: int
    compared: FoldComparison
    """Choosing the best, judged on prompts that it was not chosen on, against the configured setting."""


def choose_setting(signals: Signals, target: ArrayLike) -> SettingChoice:
    """Choose layers and threshold of the coverage, under the configured pooling.

    The best by correlation with the target within prompts, length held fixed, of those that are no worse than the
    configured setting with length left free either. It is taken where choosing like this gives a higher correlation on
    prompts that were not chosen on (the 95 % interval of the difference is above 0); else the configured setting stays.
    ``target`` is the truth or what stands in for it, ``(prompts, candidates)``.
    """
    given = signals.configured
    settings = [one for one in signals.coverage if one.pooling == given.pooling]
    # Among equals the one nearest to the configured setting comes first.
    settings.sort(key=lambda one: (one != given, one.layers != given.layers, abs(one.threshold - given.threshold)))
    values = [signals.coverage[one] for one in settings]
    products, wanted = Products.of(values, target, signals.length), np.asarray(target, dtype=np.float64)

    def best_on(prompts: Index) -> int:
        counts = np.zeros((1, len(wanted)))
        counts[0, prompts] = 1.0
        held, free = (products.correlations(counts, hold_length=hold)[0] for hold in (True, False))
        allowed = (held >= held[0]) & (free >= free[0])
        return int(np.flatnonzero(allowed & (held >= held[allowed].max() - 1e-9))[0])

    def values_of_best(others: Index, part: Index) -> Floats:
        own = centred(values[best_on(others)])
        scale = float(np.sqrt(np.square(own[others]).mean()))
        return own[part] / scale if scale > 0 else np.zeros_like(own[part])

    best = settings[best_on(np.arange(len(wanted)))]
    compared = compare(cross_fitted(wanted.shape, values_of_best), values[0], wanted, signals.length)
    better = best != given and compared.difference.low > 0
    return SettingChoice(best if better else given, best, len(settings), compared)
