"""The diagnosis: is this reward worth a training run for this model and these prompts, and what would go wrong with it?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cagsr.config import RewardConfig
from cagsr.diagnosis.attacks import ENOUGH, Attacked, AttackReport, judge_attacks, lost
from cagsr.diagnosis.best_of_n import best_of_n_gain, correlation, oracle_share, picked, within_share
from cagsr.diagnosis.cross_fit import held_fixed
from cagsr.diagnosis.forecast import LeashForecast
from cagsr.diagnosis.recommend import (
    Recommendation,
    recommend,
    term_columns,
    weighted_parts,
    weighted_reward,
    within_z,
    z_sums,
)
from cagsr.diagnosis.signals import Setting, Signals
from cagsr.evaluation.held_out import HeldOutMetric, judge
from cagsr.evaluation.intervals import Floats, Interval
from cagsr.models.stops import HARDLY_ANY, hardly_any_end
from cagsr.reward.metrics import variance_share
from cagsr.reward.normalize import FIXED
from cagsr.support.dotted_path import import_function

CONFIGURED, RECOMMENDED = "configured reward", "recommended reward"
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
    attacks: tuple[AttackReport, ...] = ()
    good_answers: str = ""
    """What the attacks were held against."""
    faithfulness: tuple[float, float] | None = None
    """Mean of the term, nats a token, and the share of the answers in which it is above 0; None: no prompt has two words."""
    forecasts: tuple[LeashForecast, ...] = ()
    """When the recommended reward begins to hurt; empty: nobody asked."""


def diagnose(
    signals: Signals,
    weights: Mapping[str, float],
    config: RewardConfig | None = None,
    attacked: Attacked | None = None,
) -> Diagnosis:
    """Analyse measured signals; ``weights`` are those of the configured reward, term -> weight.

    ``attacked``: answers made to fool the reward, measured in the same way; None: none were.
    """
    config = config or RewardConfig()
    truth = signals.truth
    named = {**signals.terms, **z_sums(signals.terms, COMBINATIONS)}
    configured = weighted_reward(signals.terms, weights, config)
    recommendation = recommend(signals, configured, weights)
    columns, within = term_columns(signals, recommendation.setting), replace(config, normalize="within_prompt")
    named[CONFIGURED] = configured
    named[RECOMMENDED] = (
        configured if recommendation.configured else weighted_reward(columns, recommendation.weights, within)
    )
    attacks: tuple[AttackReport, ...] = ()
    if attacked is not None:
        recommended = (columns, term_columns(attacked.signals, recommendation.setting, recommendation.echo_allowed))
        rewards = {
            CONFIGURED: (signals.terms, attacked.signals.terms, weights),
            RECOMMENDED: (*recommended, recommendation.weights),
        }
        if recommendation.configured:
            rewards[RECOMMENDED] = rewards[CONFIGURED]
        attacks = judge_attacks(attacked, rewards)
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
        warnings=(*warnings_for(signals, weights, config), *_about_attacks(attacks, recommendation)),
        attacks=attacks,
        good_answers="" if attacked is None else attacked.good,
        faithfulness=_faithfulness(signals),
    )


def _about_attacks(attacks: Sequence[AttackReport], recommendation: Recommendation) -> list[str]:
    found = []
    for reward in (CONFIGURED, RECOMMENDED):
        if reward == RECOMMENDED and (recommendation.configured or not recommendation.weights):
            continue
        if attacks and (better := lost(attacks, reward)):
            found.append(
                f"The {reward} can be fooled: a good answer is worth more than an attack on fewer than {ENOUGH:.0%} of the "
                f"prompts for {', '.join(better)}."
            )
    return found


def _faithfulness(signals: Signals) -> tuple[float, float] | None:
    values = signals.terms.get("faithfulness", np.empty(0))
    known = values[np.isfinite(values)]
    return (float(known.mean()), float((known > 0).mean())) if known.size else None


def load_checker(dotted_path: str) -> HeldOutMetric:
    """Import a checker ``f(prompts, completions, **columns) -> numbers``, higher is better; raises as ``import_function``."""
    return HeldOutMetric(dotted_path, import_function(dotted_path, "--checker"))


def with_truth(signals: Signals, metric: HeldOutMetric) -> Signals:
    """Judge every answer by a metric; raises as ``held_out.judge``."""
    candidates = signals.length.shape[1]
    repeated = [encoded.prompt for encoded in signals.prompts for _ in range(candidates)]
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


def warnings_for(signals: Signals, weights: Mapping[str, float], config: RewardConfig | None = None) -> list[str]:
    """Say in plain words what would go wrong with the configured reward on these prompts."""
    config = config or RewardConfig()
    found = []
    parts = weighted_parts(signals.terms, weights, config)
    reward = sum(parts.values(), np.zeros_like(signals.length))
    bias = correlation(reward, signals.length)
    if abs(bias) > 0.3:
        found.append(
            f"This reward pays for {'long' if bias > 0 else 'short'} answers: within a prompt it correlates {bias:+.2f} "
            "with length; change the weights, or watch the length."
        )
    for name in parts:
        share = within_share(signals.terms[name])
        if share < 0.1 and name != "repetition" and name not in FIXED:
            found.append(
                f"{name} hardly varies within a prompt ({share:.0%} of its variance lies there, the rest between prompts): "
                + (
                    "training follows that small part alone, magnified to a standard deviation of 1."
                    if config.normalize == "within_prompt"
                    else "its weight moves the reward little; use --reward.normalize within_prompt."
                )
            )
    if "coverage" in parts:
        mean = float(np.mean(signals.terms["coverage"]))
        at = f"(mean {mean:.2f} at threshold {signals.configured.threshold:g})"
        if mean > 0.9:
            found.append(f"Coverage is saturated {at}: raise the threshold.")
        elif mean < 0.1:
            found.append(f"Nearly nothing is covered {at}: lower the threshold.")
    cut = 1.0 - float(signals.ended.mean())
    if 1.0 - cut < HARDLY_ANY:
        found.append(hardly_any_end(1.0 - cut))
    elif cut > 0.5:
        found.append(f"Most answers hit the length limit ({cut:.0%}): raise --sampling.max_new_tokens.")
    centred = {name: part - part.mean(axis=1, keepdims=True) for name, part in parts.items()}
    within = {name: torch.from_numpy(part.ravel()) for name, part in centred.items()}
    for name, part in within.items():
        share = variance_share(part, sum(within.values(), torch.zeros_like(part)))
        if len(parts) > 1 and share > 0.9:
            found.append(f"One term dominates: {name} holds {share:.0%} of the reward's variance within a prompt.")
    repeated = correlation(reward, signals.repetition)
    if repeated > 0.2:
        found.append(
            f"This reward pays for repetition (correlation {repeated:+.2f} within a prompt): penalise it more."
        )
    same = float(np.mean([len(set(texts)) / len(texts) for texts in signals.completions]))
    if same < 0.5:
        found.append(
            f"The answers to a prompt are mostly the same ({same:.0%} differ): raise --sampling.temperature, or the "
            "model has nothing left to choose from."
        )
    if signals.truth is not None:
        found += _about_truth(signals, reward)
    return found


def _about_truth(signals: Signals, reward: Floats) -> list[str]:
    assert signals.truth is not None
    if not np.any(within_z(signals.truth)):
        return [f"{signals.truth_name} says the same of all answers to a prompt: it can't judge a reward here."]
    if held_fixed(signals.truth, signals.truth, signals.length) == 0:
        return [f"{signals.truth_name} is the length of an answer and nothing else: it can't judge a reward here."]
    seen = correlation(reward, signals.truth)
    if seen < 0.1:
        return [
            f"The configured reward hardly sees {signals.truth_name} (correlation {seen:+.2f} within a prompt): training "
            "on it is unlikely to help."
        ]
    return []
