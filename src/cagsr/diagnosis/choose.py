"""Which layers and which threshold, of a hundred choices: the best, if it is better than the configured one beyond luck."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cagsr.diagnosis.cross_fit import FoldComparison, Index, Products, centred, compare, cross_fitted
from cagsr.diagnosis.signals import Setting, Signals

Floats = NDArray[np.float64]


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

    Args:
        signals: what was measured.
        target: ``(prompts, candidates)``, the truth or what stands in for it.
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
