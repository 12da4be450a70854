"""A model's judged answers, and two models' answers held against each other, prompt by prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cagsr.evaluation import intervals
from cagsr.evaluation.intervals import Floats, Interval, mean_interval
from cagsr.evaluation.judge_answers import AnswerJudge
from cagsr.evaluation.metrics import distinct_of_draws, self_bleu
from cagsr.evaluation.pass_at_k import PASSING, passes
from cagsr.flow import EncodedPrompt
from cagsr.support.extras import has_extra

DESCRIPTIVE = ("words", "tokens", "ended", "entropy")
"""Measures that are compared with an interval but not tested: neither more nor less of them is better."""


@dataclass(frozen=True)
class Evaluated:
    """Answers of one model under one setting, judged."""

    name: str
    """``temperature 1``, ``greedy``, ``as given``."""
    temperature: float | None
    """None for answers from a file."""
    answers: tuple[tuple[str, ...], ...]
    """The answers to each prompt."""
    values: Mapping[str, Floats]
    """Measure -> ``(prompts,)``, the mean over the prompt's answers; NaN where it could not be measured."""
    of_set: Mapping[str, float]
    """Measures of the whole set, which have no interval: distinct-1 and distinct-2."""
    scores: tuple[Floats, ...] | None = None
    """The unseen reward model's scores of the answers to each prompt."""

    def interval(self, measure: str) -> Interval | None:
        """Mean over prompts with its interval; None where it was not measured, or no prompt has a value."""
        values = self.values.get(measure, np.empty(0))
        known = values[np.isfinite(values)]
        return mean_interval(known) if len(known) else None


@dataclass(frozen=True)
class Difference:
    """One measure of this model less the other's, over the prompts that have both."""

    measure: str
    values: Floats = field(repr=False)
    """``(prompts,)``, NaN where a side has none."""
    mine: Interval
    theirs: Interval
    difference: Interval
    p: float | None
    """Two-sided, uncorrected; None for what is not tested."""
    p_holm: float | None = None
    """Corrected for all tests of the evaluation."""


@dataclass(frozen=True)
class PolicyComparison:
    """One model under one setting against the other under one of its own."""

    name: str
    mine: str
    """Name of this model's setting."""
    theirs: str
    """Name of the other's."""
    differences: tuple[Difference, ...]


def evaluate_answers(
    name: str,
    temperature: float | None,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[str]],
    judge: AnswerJudge,
    more: Mapping[str, Floats] | None = None,
) -> Evaluated:
    """Judge the answers to each prompt. Raises as ``AnswerJudge.measure``.

    ``name`` is that of the setting; ``more`` are further measures of the single answers, ``(all answers,)`` each, those to a
    prompt in a row.
    """
    repeated = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
    found = {**judge.measure(repeated, [text for own in answers for text in own]), **(more or {})}
    ends = np.cumsum([len(own) for own in answers])[:-1]
    values = {measure: _means(np.split(flat, ends)) for measure, flat in found.items()}
    fewest = min(len(own) for own in answers)
    passing = next(
        (
            name
            for name in PASSING
            if name in found and set(found[name][np.isfinite(found[name])].tolist()) <= {0.0, 1.0}
        ),
        None,
    )
    if passing is not None and fewest > 1:
        values |= passes(np.split(found[passing], ends))
    if fewest > 1 and has_extra("nltk"):
        values["self_bleu"] = np.array([self_bleu(own) for own in answers])
    drawn = [text for own in answers for text in own[:fewest]]
    return Evaluated(
        name=name,
        temperature=temperature,
        answers=tuple(tuple(own) for own in answers),
        values=values,
        of_set={f"distinct_{n}": distinct_of_draws(drawn, fewest, n) for n in (1, 2)},
        scores=tuple(np.split(found["reward_model"], ends)) if "reward_model" in found else None,
    )


def compare(name: str, mine: Evaluated, theirs: Evaluated) -> PolicyComparison:
    """Hold one model's answers against another's to the same prompts, paired by prompt.

    Besides the measures that both have there is ``win_rate`` where both were scored by the unseen reward model; its
    difference is wins less losses.
    """
    pairs = {
        measure: (mine.values[measure], theirs.values[measure]) for measure in mine.values if measure in theirs.values
    }
    if mine.scores is not None and theirs.scores is not None:
        won = intervals.win_rates(mine.scores, theirs.scores)
        pairs["win_rate"] = (won, 1.0 - won)
    found = []
    for measure, (first, second) in pairs.items():
        known = np.isfinite(first) & np.isfinite(second)
        if known.any():
            one, other = first[known], second[known]
            means = (mean_interval(one), mean_interval(other), intervals.paired_difference(one, other))
            p = None if measure in DESCRIPTIVE else intervals.paired_p_value(one, other)
            found.append(Difference(measure, first - second, *means, p))
    return PolicyComparison(name, mine.name, theirs.name, tuple(found))


def corrected(comparisons: Sequence[PolicyComparison]) -> list[PolicyComparison]:
    """The same comparisons with ``p_holm``: Holm's correction over all their tests together."""
    adjusted = iter(intervals.holm([one.p for found in comparisons for one in found.differences if one.p is not None]))

    def with_holm(one: Difference) -> Difference:
        return one if one.p is None else dataclasses.replace(one, p_holm=next(adjusted))

    return [dataclasses.replace(one, differences=tuple(map(with_holm, one.differences))) for one in comparisons]


def _means(parts: Sequence[Floats]) -> Floats:
    """Mean of the finite numbers of each part, NaN where there is none."""
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])
