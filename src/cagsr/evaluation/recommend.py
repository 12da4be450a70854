"""From measured signals to a recommendation: layers, threshold, weights, and warnings in plain words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from cagsr.config import AttentionConfig, RewardConfig
from cagsr.evaluation.best_of_n import correlation, within_share
from cagsr.evaluation.collect import Setting, Signals
from cagsr.evaluation.metrics import lexical_relevance, word_weights
from cagsr.models.stops import HARDLY_ANY, hardly_any_end
from cagsr.reward.metrics import variance_share
from cagsr.reward.normalize import Normalization, Normalizer
from cagsr.reward.values import TermValues
from cagsr.reward.weigh import weigh

Floats = NDArray[np.float64]

WEIGHED = (
    "coverage",
    "copy_coverage",
    "grounded_coverage",
    "associated_coverage",
    "focus",
    "self_certainty",
    "unsupported",
)
"""Terms whose weights are fitted; repetition stays a guard, length and mean mass measure length."""
PENALTIES = frozenset({"unsupported"})
"""Those of them whose weight is negative."""
ALL_WEIGHTS = (*WEIGHED, "repetition")
CLOSE = 0.02
"""Correlations nearer than this count as equal: the simpler or configured choice wins."""
GUARD = -0.3
"""Weight of repetition in a recommendation whose other terms together have the standard deviation 1 within a prompt."""
SMALL = 0.2
"""A weight below this share of the largest is left out."""


@dataclass(frozen=True)
class Recommendation:
    """What to train with."""

    setting: Setting
    weights: Mapping[str, float]
    """Term -> weight, for ``reward.normalize within_prompt``; terms not named: 0. Empty: no term helps."""
    reasons: tuple[str, ...]
    """What it rests on, one sentence each."""


def within_z(values: ArrayLike) -> Floats:
    """Centre each row and divide by the standard deviation that is left over all rows; NaN becomes 0.

    ``(prompts, candidates)`` in and out; zeros where the values do not vary within any row.
    """
    x = np.asarray(values, dtype=np.float64)
    given, group = TermValues.of(torch.from_numpy(x.ravel().copy())), _prompt_of_each(x)
    normalizer = Normalizer(["x"], "within_prompt", clip=0.0)
    normalizer.update({"x": given}, group)
    return normalizer("x", given, group).numpy().reshape(x.shape)


def _prompt_of_each(values: Floats) -> torch.Tensor:
    """``(prompts * candidates,)`` int64, the number of each value's prompt."""
    return torch.arange(values.shape[0]).repeat_interleave(values.shape[1])


def agreement_target(signals: Signals) -> Floats:
    """What stands in for the truth without a checker: self-certainty plus the prompt's words that an answer uses.

    Neither reads attention, so that a coverage which agrees with them is likely to see the prompt's content.
    """
    weights = word_weights([encoded.prompt.text for encoded in signals.prompts])
    relevance = np.array(
        [
            [lexical_relevance(encoded.prompt.text, text, weights) for text in texts]
            for encoded, texts in zip(signals.prompts, signals.completions, strict=True)
        ]
    )
    return within_z(within_z(signals.terms["self_certainty"]) + within_z(relevance))


def setting_quality(signals: Signals, target: ArrayLike) -> dict[Setting, float]:
    """Rate the choices of layers and threshold, under the configured pooling.

    With a truth: the within-prompt correlation of the best weighted sum of terms under that choice. Without: the
    agreement of the coverage with the target, less its correlation with length as far as that is above 0.2.
    """
    found = {}
    for setting, values in signals.coverage.items():
        if setting.pooling != signals.configured.pooling:
            continue
        if signals.truth is None:
            short = max(0.0, abs(correlation(values, signals.length)) - 0.2)
            found[setting] = correlation(values, target) - short
        else:
            columns = term_columns(signals, setting)
            weights = fit_weights(_weighed(columns), target)
            total = sum((weight * within_z(columns[name]) for name, weight in weights.items()), np.zeros_like(values))
            found[setting] = correlation(total, target)
    return found


def best_setting(quality: Mapping[Setting, float], configured: Setting) -> Setting:
    """Pick the best setting; of those as good the configured one, then one with its layers and a near threshold."""
    best = max(quality.values())
    close = [setting for setting, value in quality.items() if value >= best - CLOSE]
    return max(
        close,
        key=lambda setting: (
            setting == configured,
            setting.layers == configured.layers,
            -abs(setting.threshold - configured.threshold),
            quality[setting],
        ),
    )


def fit_weights(columns: Mapping[str, ArrayLike], target: ArrayLike, ridge: float = 0.05) -> dict[str, float]:
    """Ridge weights of within-prompt z-scores that predict the target best; small ones left out.

    ``min_w |target - sum_i w_i z_i|^2 / n + ridge |w|^2``, ``w >= 0`` (``<= 0`` for ``PENALTIES``), both sides as
    :func:`within_z`. Weights below ``SMALL`` of the largest are set aside and the rest is fitted again. Empty where no
    column helps.
    """
    names = [name for name, values in columns.items() if np.any(within_z(values))]
    y = within_z(target).ravel()
    while names:
        matrix = np.stack([_sign(name) * within_z(columns[name]).ravel() for name in names], axis=1)
        penalty = np.sqrt(ridge * len(y)) * np.eye(len(names))
        solution, _ = nnls(np.vstack([matrix, penalty]), np.concatenate([y, np.zeros(len(names))]))
        largest = solution.max()
        if largest <= 1e-6:
            return {}
        kept = [name for name, weight in zip(names, solution, strict=True) if weight >= SMALL * largest]
        if len(kept) == len(names):
            return {name: _sign(name) * float(weight) for name, weight in zip(names, solution, strict=True)}
        names = kept
    return {}


def _sign(name: str) -> float:
    return -1.0 if name in PENALTIES else 1.0


def _weighed(columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """The terms whose weights are fitted, of those that were measured."""
    return {name: columns[name] for name in WEIGHED if name in columns}


def training_weights(weights: Mapping[str, float], columns: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Scale weights of within-prompt z-scores for ``reward.normalize within_prompt``.

    The standard deviation of the weighted sum within a prompt becomes 1, comparable with a KL coefficient and the
    missing-EOS penalty. Two significant digits; empty where nothing varies.
    """
    if not weights:
        return {}
    total = np.sum([weight * within_z(columns[name]) for name, weight in weights.items()], axis=0)
    # As training counts: the prompts' means cost a degree of freedom each.
    spread = float(np.sqrt(np.square(total).sum() / (total.size - len(total))))
    return {name: float(f"{weight / spread:.2g}") for name, weight in weights.items()} if spread > 0 else {}


def term_columns(signals: Signals, setting: Setting) -> dict[str, Floats]:
    """All terms as they would be under ``setting``: the attention terms at its layers, the coverage at its threshold."""
    return {**signals.terms, **signals.by_layers[setting.layers], "coverage": signals.coverage[setting]}


def recommend(signals: Signals) -> Recommendation:
    """Choose layers, threshold and weights.

    With a truth by correlation within prompts; without one by agreement of the signals and low correlation with
    length, which is said in the reasons.
    """
    target = agreement_target(signals) if signals.truth is None else signals.truth
    quality = setting_quality(signals, target)
    setting = best_setting(quality, signals.configured)
    columns = term_columns(signals, setting)
    judged = "signals that read no attention" if signals.truth is None else signals.truth_name
    reasons = [
        f"Coverage at layers {setting.layers}, threshold {setting.threshold:g} correlates "
        f"{correlation(columns['coverage'], target):+.2f} with {judged} within a prompt (as configured: "
        f"{correlation(signals.coverage[signals.configured], target):+.2f})."
    ]
    usable = _weighed(columns)
    if signals.truth is not None:
        weights = fit_weights(usable, signals.truth)
        reasons.append("The weights are a least-squares fit to it on z-scores within a prompt.")
    else:
        weights = _agreeing(usable, signals.length)
        reasons.append(
            "There is no checker and no reference: this rests on the agreement between signals and on a low correlation "
            "with length, not on truth. Give --checker, or rows with references, to test it."
        )
    paid = sum((weight * within_z(columns[name]) for name, weight in weights.items()), np.zeros_like(signals.length))
    bias = correlation(paid, signals.length)
    if abs(bias) > 0.3:
        reasons.append(
            f"It pays for {'long' if bias > 0 else 'short'} answers too (correlation {bias:+.2f} with length within a "
            "prompt): watch the length in training."
        )
    scaled = training_weights(weights, columns)
    return Recommendation(setting, {**scaled, "repetition": GUARD} if scaled else {}, tuple(reasons))


def _agreeing(columns: Mapping[str, Floats], length: Floats) -> dict[str, float]:
    """Coverage, plus each term that agrees with it without repeating it and keeps the sum from paying for length."""
    if not np.any(within_z(columns["coverage"])):
        return {}
    weights, total = {"coverage": 1.0}, within_z(columns["coverage"])
    for name in ("associated_coverage", "grounded_coverage", "copy_coverage", "self_certainty", "unsupported"):
        if name not in columns or (name == "copy_coverage" and "grounded_coverage" in weights):
            continue
        sign = _sign(name)
        agrees = 0.05 < sign * correlation(columns[name], total) < 0.9
        more = total + sign * within_z(columns[name])
        if agrees and abs(correlation(more, length)) <= 0.3:
            weights[name], total = sign, more
    return weights


def weighted_parts(
    terms: Mapping[str, Floats],
    weights: Mapping[str, float],
    normalize: Normalization = "within_prompt",
    clip: float = 5.0,
) -> dict[str, Floats]:
    """Normalise and weigh terms as training does: name -> ``(prompts, candidates)``, terms of weight 0 left out."""
    active = {name: weight for name, weight in weights.items() if weight != 0 and name in terms}
    if not active:
        return {}
    raw = {name: torch.from_numpy(np.asarray(terms[name], dtype=np.float64).ravel().copy()) for name in active}
    shape = terms[next(iter(active))].shape
    config = RewardConfig(normalize=normalize, clip=clip)
    found = weigh(raw, active, config, _prompt_of_each(terms[next(iter(active))]))
    return {name: part.numpy().reshape(shape) for name, part in found.contributions.items()}


def warnings_for(
    signals: Signals, weights: Mapping[str, float], normalize: Normalization = "within_prompt", clip: float = 5.0
) -> list[str]:
    """Say in plain words what would go wrong with the configured reward on these prompts.

    Args:
        signals: what was measured.
        weights: term -> configured weight.
        normalize: as ``reward.normalize``.
        clip: as ``reward.clip``.
    """
    found = []
    parts = weighted_parts(signals.terms, weights, normalize, clip)
    reward = sum(parts.values(), np.zeros_like(signals.length))
    bias = correlation(reward, signals.length)
    if abs(bias) > 0.3:
        found.append(
            f"This reward pays for {'long' if bias > 0 else 'short'} answers: within a prompt it correlates {bias:+.2f} "
            "with length; change the weights, or watch the length."
        )
    for name in parts:
        share = within_share(signals.terms[name])
        if share < 0.1 and name != "repetition":
            found.append(
                f"{name} hardly varies within a prompt ({share:.0%} of its variance lies there, the rest between prompts): "
                + (
                    "training follows that small part alone, magnified to a standard deviation of 1."
                    if normalize == "within_prompt"
                    else "its weight moves the reward little; use --reward.normalize within_prompt."
                )
            )
    found += _about_coverage(signals) if "coverage" in parts else []
    cut = 1.0 - float(signals.ended.mean())
    if 1.0 - cut < HARDLY_ANY:
        found.append(hardly_any_end(1.0 - cut))
    elif cut > 0.5:
        found.append(f"Most answers hit the length limit ({cut:.0%}): raise --sampling.max_new_tokens.")
    within = {name: torch.from_numpy(_centred(part).ravel()) for name, part in parts.items()}
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


def _about_coverage(signals: Signals) -> list[str]:
    mean = float(np.mean(signals.terms["coverage"]))
    threshold = signals.configured.threshold
    if mean > 0.9:
        return [f"Coverage is saturated (mean {mean:.2f} at threshold {threshold:g}): raise the threshold."]
    if mean < 0.1:
        return [f"Nearly nothing is covered (mean {mean:.2f} at threshold {threshold:g}): lower the threshold."]
    return []


def _about_truth(signals: Signals, reward: Floats) -> list[str]:
    assert signals.truth is not None
    if not np.any(within_z(signals.truth)):
        return [f"{signals.truth_name} says the same of all answers to a prompt: it can't judge a reward here."]
    seen = correlation(reward, signals.truth)
    if seen < 0.1:
        return [
            f"The configured reward hardly sees {signals.truth_name} (correlation {seen:+.2f} within a prompt): training "
            "on it is unlikely to help."
        ]
    return []


def _centred(values: Floats) -> Floats:
    return np.asarray(values - values.mean(axis=1, keepdims=True))


def flags_of(recommendation: Recommendation) -> list[str]:
    """Write the recommendation as flags of ``cagsr train``."""
    setting = recommendation.setting
    flags = [f"--attention.layers {setting.layers}", f"--reward.coverage.threshold {setting.threshold:g}"]
    return flags + [f"--reward.{name}.weight {recommendation.weights.get(name, 0.0):g}" for name in ALL_WEIGHTS]


def yaml_of(
    recommendation: Recommendation, attention: AttentionConfig, reward: RewardConfig
) -> dict[str, dict[str, object]]:
    """Write the recommendation as the settings of a ``--config`` file, beside those that it was measured under."""
    chosen, given = recommendation.setting, _set(reward, RewardConfig())
    sections: dict[str, object] = {"normalize": "within_prompt"}
    for name in ALL_WEIGHTS:
        threshold = {"threshold": chosen.threshold} if name == "coverage" else {}
        sections[name] = {**given.get(name, {}), "weight": recommendation.weights.get(name, 0.0), **threshold}
    sections |= {name: given[name] for name in ("associations", "clip") if name in given}
    return {"attention": _set(attention, AttentionConfig()) | {"layers": chosen.layers}, "reward": sections}


def _set(config: Any, default: Any) -> dict[str, Any]:
    """What is not at its default, section by section."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        usual = getattr(default, name)
        if value != usual:
            found[name] = _set(value, usual) if dataclasses.is_dataclass(value) else value
    return found
