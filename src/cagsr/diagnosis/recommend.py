"""From measured signals to a recommendation: layers, threshold, weights, and warnings in plain words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from cagsr.config import AttentionConfig, RewardConfig
from cagsr.diagnosis import cross_fit
from cagsr.diagnosis.best_of_n import correlation
from cagsr.diagnosis.cross_fit import FoldComparison, Index, Products, SettingChoice
from cagsr.diagnosis.signals import Setting, Signals, prompts_of
from cagsr.evaluation.intervals import Floats
from cagsr.evaluation.metrics import lexical_relevance, word_weights
from cagsr.parse import differing
from cagsr.reward.normalize import Normalizer
from cagsr.reward.terms.echo import EchoConfig, copied_share, echo
from cagsr.reward.values import TermValues
from cagsr.reward.weigh import contributions, weigh

WEIGHED = (
    *("coverage", "copy_coverage", "grounded_coverage", "associated_coverage"),
    *("focus", "self_certainty", "unsupported"),
)
"""Terms whose weights are fitted; repetition stays a guard, length and mean mass measure length."""
PENALTIES = frozenset({"unsupported"})
"""Those of them whose weight is negative."""
ALL_WEIGHTS = (*WEIGHED, "length", "echo", "repetition")
LENGTH = 0.2
"""Correlation with length within a prompt that a recommended reward may have."""
GUARD = -0.1
"""Weight of repetition in a recommendation whose other terms together have the standard deviation 1 within a prompt. Repetitions
are rare, so that one weighs heavily: with -0.3 the sum saw less of the truth (Gemma 3 270M: 0.73 for 0.76)."""
ECHO = EchoConfig().weight
"""Weight of echo in a recommendation, on its own scale."""
USUAL = 0.95
"""Quantile of the sampled answers' copied share up to which a recommendation lets answers copy."""
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
    configured: bool = False
    """The configured reward as it is, ``reward.normalize``, functions and models included: nothing better was found."""
    echo_allowed: float | None = None
    """``reward.echo.allowed`` where echo has a weight."""
    compared: FoldComparison | None = None
    """Fitting weights, judged on prompts that they were not fitted on, against the configured reward; None: no truth."""


def within_z(values: ArrayLike) -> Floats:
    """Centre each row and divide by the standard deviation that is left over all rows; NaN becomes 0.

    ``(prompts, candidates)`` in and out; zeros where the values do not vary within any row.
    """
    x = np.asarray(values, dtype=np.float64)
    given, group = TermValues.of(torch.from_numpy(x.ravel().copy())), prompt_of_each(x)
    normalizer = Normalizer(["x"], "within_prompt", clip=0.0)
    normalizer.update({"x": given}, group)
    return normalizer("x", given, group).numpy().reshape(x.shape)


def prompt_of_each(values: Floats) -> torch.Tensor:
    """``(prompts * candidates,)`` int64, the number of each value's prompt."""
    return torch.arange(values.shape[0]).repeat_interleave(values.shape[1])


def agreement_target(signals: Signals) -> Floats:
    """What stands in for the truth without a checker: self-certainty plus the prompt's words that an answer uses.

    Neither reads attention, so that a coverage which agrees with them is likely to see the prompt's content.
    """
    weights = word_weights([encoded.prompt.text for encoded in signals.prompts])
    asked = zip(signals.prompts, signals.completions, strict=True)
    relevance = np.array(
        [[lexical_relevance(one.prompt.text, text, weights) for text in texts] for one, texts in asked]
    )
    return within_z(within_z(signals.terms["self_certainty"]) + within_z(relevance))


def fit_weights(
    columns: Mapping[str, ArrayLike], target: ArrayLike, ridge: float = 0.05, length: ArrayLike | None = None
) -> dict[str, float]:
    """Ridge weights of within-prompt z-scores that predict the target best; small ones left out.

    ``min_w |target - sum_i w_i z_i|^2 / n + ridge |w|^2``, ``w >= 0`` (``<= 0`` for ``PENALTIES``), both sides as
    :func:`within_z`. Weights below ``SMALL`` of the largest are set aside and the rest is fitted again. Empty where no
    column helps. With ``length``, ``(prompts, candidates)``, what length explains of the target is left to it: a multiple
    of it, of either sign and free of the penalty, is fitted beside the weights and thrown away.
    """
    scored = {name: _sign(name) * within_z(values).ravel() for name, values in columns.items()}
    names = [name for name, values in scored.items() if np.any(values)]
    y = within_z(target).ravel()
    z = np.zeros((len(y), 0)) if length is None else np.outer(within_z(length).ravel(), [1.0, -1.0])
    while names:
        matrix = np.stack([scored[name] for name in names], axis=1)
        penalty = np.sqrt(ridge * len(y)) * np.eye(len(names), len(names) + z.shape[1])
        system = np.vstack([np.hstack([matrix, z]), penalty])
        solution = nnls(system, np.concatenate([y, np.zeros(len(names))]))[0][: len(names)]
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


def training_weights(
    weights: Mapping[str, float], columns: Mapping[str, ArrayLike], length: Floats | None = None
) -> dict[str, float]:
    """Scale weights of within-prompt z-scores for ``reward.normalize within_prompt``.

    With ``length`` a weight for it is added, where the sum pays for long answers (:func:`against_length`).

    The standard deviation of the weighted sum within a prompt becomes 1, comparable with a KL coefficient and the
    missing-EOS penalty. Two significant digits; empty where nothing varies.
    """
    if not weights:
        return {}
    total = np.sum([weight * within_z(columns[name]) for name, weight in weights.items()], axis=0)
    # As training counts: the prompts' means cost a degree of freedom each.
    spread = float(np.sqrt(np.square(total).sum() / (total.size - len(total))))
    if spread <= 0:
        return {}
    scaled = {name: float(f"{weight / spread:.2g}") for name, weight in weights.items()}
    against = 0.0 if length is None else against_length(total, length)
    return scaled | ({"length": float(f"{against:.2g}")} if against else {})


def term_columns(signals: Signals, setting: Setting, allowed: float | None = None) -> dict[str, Floats]:
    """All terms as they would be under ``setting``: the attention terms at its layers, the coverage at its threshold.

    Echo is that with ``allowed``; None: what these answers usually copy.
    """
    columns = {**signals.terms, **signals.by_layers[setting.layers], "coverage": signals.coverage[setting]}
    if signals.prompts:
        allowed = usual_copying(signals) if allowed is None else allowed
        asked = zip(signals.prompts, signals.completions, strict=True)
        columns["echo"] = np.array(
            [[echo(one.prompt.text, text, one.prompt.template, allowed) for text in texts] for one, texts in asked]
        )
    return columns


def usual_copying(signals: Signals) -> float:
    """The share of an answer's words that is the prompt's in all but the most copying of these answers; at most 0.98."""
    asked = zip(signals.prompts, signals.completions, strict=True)
    shares = [copied_share(one.prompt.text, text, one.prompt.template)[0] for one, texts in asked for text in texts]
    return min(0.98, round(float(np.quantile(shares, USUAL)), 2))


def guards(signals: Signals) -> dict[str, float]:
    """The weights that every recommendation has besides those that are fitted."""
    return {"repetition": GUARD} | ({"echo": ECHO} if signals.prompts else {})


def recommend(signals: Signals, configured: Floats, weights: Mapping[str, float]) -> Recommendation:
    """Choose layers, threshold and weights: never worse than the configured ones on these prompts.

    With a truth by correlation within prompts, length held fixed, and judged on prompts that the choice was not made on:
    what is not better there than the configured reward, beyond luck, does not replace it. Without a truth by agreement of
    the signals and low correlation with length, which is said in the reasons. ``configured`` is the configured reward,
    ``(prompts, candidates)``, and ``weights`` are its weights.
    """
    if signals.truth is None:
        return _without_truth(signals)
    choice = cross_fit.choose_setting(signals, signals.truth)
    setting, fitted = fit_reward(signals)
    reasons = [_about_setting(signals, choice, signals.truth_name)]
    compared = cross_fit.compare(
        cross_fit.cross_fitted(signals.length.shape, lambda others, part: _fitted_elsewhere(signals, others, part)),
        configured,
        signals.truth,
        signals.length,
    )
    reasons.append(
        f"Weights fitted by least squares reach {compared.new:+.2f} with {signals.truth_name} on prompts they were not "
        f"fitted on, length held fixed; the configured reward {compared.old:+.2f}: difference {compared.difference:+.2f}."
    )
    reward = weighted_reward(term_columns(signals, setting), fitted)
    if fitted and compared.difference.low > 0 and _no_worse(reward, configured, signals):
        reasons += _about_length(reward, signals.length)
        allowed = _allowed(signals, fitted)
        return Recommendation(setting, fitted, tuple(reasons), echo_allowed=allowed, compared=compared)
    if not fitted and compared.old.low <= 0:
        return Recommendation(signals.configured, {}, tuple(reasons), compared=compared)
    reasons.append(
        "That is no better beyond luck, so the configured reward stays"
        + (": more prompts (--num_prompts) tell smaller differences apart." if compared.difference.high > 0 else ".")
    )
    kept = {name: weight for name, weight in weights.items() if weight != 0}
    return Recommendation(signals.configured, kept, tuple(reasons), True, compared=compared)


def fit_reward(signals: Signals) -> tuple[Setting, dict[str, float]]:
    """Fit a reward to the truth: under the chosen setting or under the configured one, whichever then sees more.

    Gives the setting, and weights for training, the guard against repetition among them; empty where no term helps.
    """
    assert signals.truth is not None
    found: list[tuple[float, Setting, dict[str, float]]] = []
    for setting in dict.fromkeys((cross_fit.choose_setting(signals, signals.truth).setting, signals.configured)):
        columns = term_columns(signals, setting)
        weighed = {name: columns[name] for name in WEIGHED if name in columns}
        fitted = fit_weights(weighed, signals.truth, length=signals.length)
        weights = training_weights(fitted, columns, signals.length)
        if weights:
            weights |= guards(signals)
        seen = cross_fit.held_fixed(weighted_reward(columns, weights), signals.truth, signals.length)
        found.append((seen, setting, weights))
    _, setting, weights = max(found, key=lambda one: one[0])  # of equals the chosen setting, which comes first
    return setting, weights


def _allowed(signals: Signals, weights: Mapping[str, float]) -> float | None:
    return usual_copying(signals) if "echo" in weights else None


def _fitted_elsewhere(signals: Signals, others: Index, part: Index) -> Floats:
    """The reward of some prompts by weights, setting and scales that were fitted on the others."""
    setting, weights = fit_reward(prompts_of(signals, others))
    reward = np.zeros((len(part), signals.length.shape[1]))
    if not weights:
        return reward
    columns = term_columns(signals, setting, _allowed(prompts_of(signals, others), weights))
    normalizer = Normalizer(list(weights), "within_prompt")
    learned = {name: TermValues.of(torch.from_numpy(columns[name][others].ravel())) for name in weights}
    normalizer.update(learned, prompt_of_each(signals.length[others]))
    raw = {name: torch.from_numpy(columns[name][part].ravel()) for name in weights}
    parts = contributions(raw, weights, normalizer, prompt_of_each(reward))
    return np.sum([values.numpy().reshape(reward.shape) for values in parts.values()], axis=0)


def _no_worse(reward: Floats, configured: Floats, signals: Signals) -> bool:
    """Whether a reward sees the truth at least as well as the configured one, length held fixed or not."""
    assert signals.truth is not None
    products = Products.of([reward, configured], signals.truth, signals.length)
    counts = np.ones((1, len(reward)))
    found = [products.correlations(counts, hold_length=hold)[0] for hold in (True, False)]
    return all(new >= old for new, old in found)


def _without_truth(signals: Signals) -> Recommendation:
    target = agreement_target(signals)
    choice = cross_fit.choose_setting(signals, target)
    columns = term_columns(signals, choice.setting)
    weights = _agreeing(columns)
    reasons = [
        _about_setting(signals, choice, "signals that read no attention"),
        "There is no checker and no reference: this rests on the agreement between signals and on a low correlation "
        "with length, not on truth. Give --checker, or rows with references, to test it.",
    ]
    scaled = training_weights(weights, columns, signals.length)
    reasons += _about_length(weighted_reward(columns, scaled), signals.length)
    weights = scaled | guards(signals) if scaled else {}
    return Recommendation(choice.setting, weights, tuple(reasons), echo_allowed=_allowed(signals, weights))


def _about_setting(signals: Signals, choice: SettingChoice, judged: str) -> str:
    configured, best, compared = signals.configured, choice.best, choice.compared
    if best == configured:
        return (
            f"Layers {configured.layers}, threshold {configured.threshold:g}, as configured: none of the {choice.candidates} "
            f"choices has a coverage that sees more of {judged} ({compared.old:+.2f} within a prompt, length held fixed)."
        )
    said = (
        f"layers {best.layers}, threshold {best.threshold:g}, of {choice.candidates} choices. Choosing like this gives "
        f"{compared.new:+.2f} with {judged} within a prompt, length held fixed, on prompts that were not chosen on; as "
        f"configured ({configured.layers}, {configured.threshold:g}) it is {compared.old:+.2f}: difference "
        f"{compared.difference:+.2f}."
    )
    if choice.setting == configured:
        return f"Layers {configured.layers}, threshold {configured.threshold:g} stay: the best coverage is at {said}"
    return f"The best coverage is at {said}"


def _about_length(reward: Floats, length: Floats) -> list[str]:
    bias = correlation(reward, length)
    if abs(bias) <= 0.3:
        return []
    which = "long" if bias > 0 else "short"
    seen = f"correlation {bias:+.2f} with length within a prompt"
    return [f"It pays for {which} answers too ({seen}): watch the length in training."]


def _agreeing(columns: Mapping[str, Floats]) -> dict[str, float]:
    """Coverage, plus each term that agrees with the sum so far without repeating it: weights of z-scores within a prompt.

    Unit weights, because there is nothing to fit them to. Unsupported gets half of one: it sees what the others don't, so that
    little of it agrees. Self-certainty is left out: what it pays for first is peaked answers.
    """
    if not np.any(within_z(columns["coverage"])):
        return {}
    weights, total = {"coverage": 1.0}, within_z(columns["coverage"])
    for name in ("associated_coverage", "grounded_coverage", "copy_coverage", "unsupported"):
        if name not in columns or (name == "copy_coverage" and "grounded_coverage" in weights):
            continue
        sign = _sign(name)
        if 0.05 < sign * correlation(columns[name], total) < 0.9:
            weights[name] = sign * (0.5 if name in PENALTIES else 1.0)
            total = total + weights[name] * within_z(columns[name])
    return weights


def against_length(reward: Floats, length: Floats) -> float:
    """The weight of length, in standard deviations of the reward, that leaves a correlation of ``LENGTH`` with it within prompts.

    0 where it is no higher, and where short answers are paid. Longer answers say more, so a little of it is earned; the rest
    would be gained by going on and on. Of z-scores ``r`` and ``l`` with correlation ``c`` it is ``(c - w) / sqrt(1 - 2 w c +
    w^2)`` between ``r - w l`` and ``l``.
    """
    c = correlation(reward, length)
    if c <= LENGTH:
        return 0.0
    # (c - w)^2 = t^2 ((c - w)^2 + 1 - c^2), and c - w > 0
    return -(c - LENGTH * float(np.sqrt((1 - c * c) / (1 - LENGTH * LENGTH))))


def weighted_parts(
    terms: Mapping[str, Floats], weights: Mapping[str, float], config: RewardConfig | None = None
) -> dict[str, Floats]:
    """Normalise and weigh terms as training does: name -> ``(prompts, candidates)``, terms of weight 0 left out."""
    active = {name: weight for name, weight in weights.items() if weight != 0 and name in terms}
    if not active:
        return {}
    raw = {name: torch.from_numpy(np.asarray(terms[name], dtype=np.float64).ravel().copy()) for name in active}
    shape = terms[next(iter(active))].shape
    found = weigh(raw, active, config or RewardConfig(), prompt_of_each(terms[next(iter(active))]))
    return {name: part.numpy().reshape(shape) for name, part in found.contributions.items()}


def weighted_reward(
    terms: Mapping[str, Floats], weights: Mapping[str, float], config: RewardConfig | None = None
) -> Floats:
    """The sum of ``weighted_parts``, ``(prompts, candidates)``; zeros where there are none."""
    return sum(weighted_parts(terms, weights, config).values(), np.zeros_like(next(iter(terms.values()))))


def z_sums(terms: Mapping[str, Floats], sums: Iterable[Sequence[str]], penalty: float = 1.0) -> dict[str, Floats]:
    """Sums of z-scores within a prompt, under names like ``coverage - unsupported``: penalties count negative, ``penalty`` each.

    Those with a term that was not measured are left out.
    """
    found = {}
    minus = "-" if penalty == 1 else f"- {penalty:g}"
    for names in sums:
        if all(name in terms for name in names):
            said = " ".join(f"{minus if name in PENALTIES else '+'} {name}" for name in names[1:])
            signed = [(-penalty if name in PENALTIES else 1.0) * within_z(terms[name]) for name in names]
            found[f"{names[0]} {said}"] = np.sum(signed, axis=0)
    return found


def yaml_of(
    recommendation: Recommendation, attention: AttentionConfig, reward: RewardConfig
) -> dict[str, dict[str, object]]:
    """Write the recommendation as the settings of a ``--config`` file, beside those that it was measured under."""
    chosen, given = recommendation.setting, differing(reward, RewardConfig())
    if recommendation.configured:
        return {"attention": differing(attention, AttentionConfig()), "reward": given}
    sections: dict[str, object] = {"normalize": "within_prompt"}
    for name in ALL_WEIGHTS:
        chosen_too = {"threshold": chosen.threshold} if name == "coverage" else {}
        if name == "echo" and recommendation.echo_allowed is not None:
            chosen_too = {"allowed": recommendation.echo_allowed}
        sections[name] = {**given.get(name, {}), "weight": recommendation.weights.get(name, 0.0), **chosen_too}
    sections |= {name: given[name] for name in ("associations", "clip") if name in given}
    return {"attention": differing(attention, AttentionConfig()) | {"layers": chosen.layers}, "reward": sections}
