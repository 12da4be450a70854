"""What would go wrong with the configured reward on these prompts, in plain words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from cagsr.diagnosis.best_of_n import correlation, within_share
from cagsr.diagnosis.cross_fit import held_fixed
from cagsr.diagnosis.recommend import weighted_parts, within_z
from cagsr.diagnosis.signals import Signals
from cagsr.models.stops import HARDLY_ANY, hardly_any_end
from cagsr.reward.metrics import variance_share
from cagsr.reward.normalize import Normalization

Floats = NDArray[np.float64]


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
    if held_fixed(signals.truth, signals.truth, signals.length) == 0:
        return [f"{signals.truth_name} is the length of an answer and nothing else: it can't judge a reward here."]
    seen = correlation(reward, signals.truth)
    if seen < 0.1:
        return [
            f"The configured reward hardly sees {signals.truth_name} (correlation {seen:+.2f} within a prompt): training "
            "on it is unlikely to help."
        ]
    return []


def _centred(values: Floats) -> Floats:
    return np.asarray(values - values.mean(axis=1, keepdims=True))
