"""The diagnosis: is this reward worth a training run for this model and these prompts?

Pure functions from :class:`~cagsr.diagnosis.signals.Signals` to numbers, ready for a table or a JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cagsr.diagnosis.best_of_n import best_of_n_gain, correlation, oracle_share, picked, within_share
from cagsr.diagnosis.cross_fit import held_fixed
from cagsr.diagnosis.recommend import (
    PENALTIES,
    Recommendation,
    recommend,
    term_columns,
    weighted_parts,
    within_z,
)
from cagsr.diagnosis.signals import Setting, Signals
from cagsr.diagnosis.warn import warnings_for
from cagsr.errors import ConfigError
from cagsr.evaluation.held_out import HeldOutMetric, judge
from cagsr.evaluation.intervals import Interval
from cagsr.reward.normalize import Normalization
from cagsr.support.dotted_path import import_dotted

Floats = NDArray[np.float64]

COMBINATIONS = (
    ("coverage", "self_certainty"),
    ("coverage", "copy_coverage"),
    ("coverage", "self_certainty", "copy_coverage"),
    ("grounded_coverage", "self_certainty"),
    ("coverage", "grounded_coverage", "self_certainty"),
    ("associated_coverage", "unsupported"),
    ("associated_coverage", "unsupported", "self_certainty"),
)
"""Sums of z-scores within a prompt that are tried besides the single terms; penalties count negative."""


@dataclass(frozen=True)
class SignalReport:
    """What one signal sees; correlations are within the answers to one prompt."""

    name: str
    mean: float
    within_share: float
    """Share of its variance that lies within prompts."""
    length: float
    repetition: float
    others: Mapping[str, float]
    """Correlation with each single term."""
    truth: float | None = None
    truth_held_fixed: float | None = None
    """The same with length held fixed."""
    best_of_n: float | None = None
    """Mean truth of the answers it picks."""
    gain: Interval | None = None
    """That, above the mean of all answers."""
    oracle_share: Interval | None = None


@dataclass(frozen=True)
class SettingReport:
    """Coverage at one choice of layers, pooling and threshold."""

    setting: Setting
    mean: float
    length: float
    truth: float | None
    truth_held_fixed: float | None
    """The same with length held fixed; settings are chosen by it."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything the command prints and writes."""

    prompts: int
    candidates: int
    truth_name: str
    truth_mean: float | None
    oracle: float | None
    """Mean truth of the best answer to each prompt."""
    length: float
    ended: float
    repetition: float
    signals: tuple[SignalReport, ...]
    settings: tuple[SettingReport, ...]
    recommendation: Recommendation
    warnings: tuple[str, ...]


def diagnose(
    signals: Signals, weights: Mapping[str, float], normalize: Normalization = "within_prompt", clip: float = 5.0
) -> Diagnosis:
    """Analyse measured signals.

    Args:
        signals: what was measured.
        weights: term -> weight of the configured reward.
        normalize: as ``reward.normalize``.
        clip: as ``reward.clip``.
    """
    truth = signals.truth
    named: dict[str, Floats] = dict(signals.terms)
    for names in COMBINATIONS:
        if all(name in signals.terms for name in names):
            signs = [-1.0 if name in PENALTIES else 1.0 for name in names]
            label = names[0] + "".join(
                f" {'-' if sign < 0 else '+'} {name}" for sign, name in zip(signs[1:], names[1:], strict=True)
            )
            parts = [sign * within_z(signals.terms[name]) for sign, name in zip(signs, names, strict=True)]
            named[label] = np.sum(parts, axis=0)
    nothing = np.zeros_like(signals.length)
    configured = sum(weighted_parts(signals.terms, weights, normalize, clip).values(), nothing)
    recommendation = recommend(signals, configured, weights)
    recommended = weighted_parts(term_columns(signals, recommendation.setting), recommendation.weights, clip=clip)
    named["configured reward"] = configured
    named["recommended reward"] = configured if recommendation.configured else sum(recommended.values(), nothing)
    return Diagnosis(
        prompts=signals.length.shape[0],
        candidates=signals.length.shape[1],
        truth_name=signals.truth_name,
        truth_mean=None if truth is None else float(truth.mean()),
        oracle=None if truth is None else float(truth.max(axis=1).mean()),
        length=float(signals.length.mean()),
        ended=float(signals.ended.mean()),
        repetition=float(signals.repetition.mean()),
        signals=tuple(_signal(name, values, signals) for name, values in named.items()),
        settings=tuple(
            SettingReport(
                setting,
                float(values.mean()),
                correlation(values, signals.length),
                None if truth is None else correlation(values, truth),
                None if truth is None else held_fixed(values, truth, signals.length),
            )
            for setting, values in signals.coverage.items()
        ),
        recommendation=recommendation,
        warnings=tuple(warnings_for(signals, weights, normalize, clip)),
    )


def load_checker(dotted_path: str) -> HeldOutMetric:
    """Import a checker ``f(prompts, completions, **columns) -> numbers``, higher is better.

    Raises:
        ConfigError: it can't be imported or is no function.
    """
    function = import_dotted(dotted_path, "--checker")
    if not callable(function):
        raise ConfigError(f"--checker {dotted_path}: is {type(function).__name__}, not a function.")
    return HeldOutMetric(dotted_path, function)


def with_truth(signals: Signals, metric: HeldOutMetric) -> Signals:
    """Judge every answer by a metric.

    Raises:
        ConfigError: the metric fails, gives another number of values than there are answers, or one that is not finite.
    """
    candidates = signals.length.shape[1]
    repeated = [encoded for encoded in signals.prompts for _ in range(candidates)]
    completions = [text for texts in signals.completions for text in texts]
    truth = np.array(judge(metric, repeated, completions), dtype=np.float64).reshape(signals.length.shape)
    return replace(signals, truth=truth, truth_name=metric.name)


def _signal(name: str, values: Floats, signals: Signals) -> SignalReport:
    truth = signals.truth
    return SignalReport(
        name=name,
        mean=float(np.nanmean(values)) if np.isfinite(values).any() else 0.0,
        within_share=within_share(values) if np.isfinite(values).any() else 0.0,
        length=correlation(values, signals.length),
        repetition=correlation(values, signals.repetition),
        others={other: correlation(values, column) for other, column in signals.terms.items()},
        truth=None if truth is None else correlation(values, truth),
        truth_held_fixed=None if truth is None else held_fixed(values, truth, signals.length),
        best_of_n=None if truth is None else float(picked(values, truth).mean()),
        gain=None if truth is None else best_of_n_gain(values, truth),
        oracle_share=None if truth is None else oracle_share(values, truth),
    )
