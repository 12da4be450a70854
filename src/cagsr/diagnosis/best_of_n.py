"""What a signal sees within the answers to one prompt, and what picking by it gains: of ``(prompts, candidates)`` arrays."""

import numpy as np
import torch
from numpy.typing import ArrayLike

from cagsr.evaluation.intervals import Floats, Interval, draw_counts, mean_interval
from cagsr.reward.metrics import within_group_correlation


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation of two ``(prompts, candidates)`` arrays after centring each row: what a policy gradient sees.

    NaN (a term that does not apply) is left out; 0.0 where either does not vary within any row.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"expected two arrays of shape (prompts, candidates), got {first.shape} and {second.shape}")
    group = np.repeat(np.arange(first.shape[0]), first.shape[1])
    return within_group_correlation(
        torch.from_numpy(first.ravel()), torch.from_numpy(second.ravel()), torch.from_numpy(group)
    )


def picked(scores: ArrayLike, truth: ArrayLike) -> Floats:
    """The truth of each prompt's best candidate by ``scores``, ``(prompts,)``; ties share (the mean over the tied).

    A score of NaN is never the best; a row of NaN picks at random, which is the row's mean.
    """
    given, true = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    filled = np.where(np.isnan(given), -np.inf, given)
    best = filled == filled.max(axis=1, keepdims=True)
    return np.asarray((best * true).sum(axis=1) / best.sum(axis=1))


def best_of_n_gain(scores: ArrayLike, truth: ArrayLike) -> Interval:
    """Mean over prompts of (truth of the picked candidate - mean truth of all), with its bootstrap interval."""
    true = np.asarray(truth, dtype=np.float64)
    return mean_interval(picked(scores, true) - true.mean(axis=1))


def oracle_share(scores: ArrayLike, truth: ArrayLike) -> Interval:
    """Best-of-N gain by ``scores`` as a share of the gain of an oracle that sees the truth, with its interval.

    A ratio of sums over prompts, so that a prompt counts by how much there is to gain; the percentile bootstrap draws
    prompts. All zeros where the candidates of no prompt differ in truth.
    """
    true = np.asarray(truth, dtype=np.float64)
    gain = picked(scores, true) - true.mean(axis=1)
    oracle = true.max(axis=1) - true.mean(axis=1)
    if oracle.sum() <= 1e-12:
        return Interval(0.0, 0.0, 0.0)
    counts = draw_counts(len(gain), 2000)
    possible = counts @ oracle
    return Interval.of(gain.sum() / oracle.sum(), (counts @ gain)[possible > 1e-12] / possible[possible > 1e-12])


def within_share(values: ArrayLike) -> float:
    """Share of a signal's variance that lies within prompts, 0 to 1; 0 where it does not vary at all."""
    x = np.asarray(values, dtype=np.float64)
    total = np.nanvar(x)
    return float(np.nanmean(np.nanvar(x, axis=1)) / total) if total > 1e-16 else 0.0
