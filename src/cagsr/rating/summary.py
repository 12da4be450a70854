"""The ratings of a file in numbers: who wins how often, with an interval, and whether the raters agree."""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import krippendorff
import numpy as np

from cagsr.evaluation.intervals import Floats, Interval, mean_interval, paired_difference
from cagsr.html_page import fill
from cagsr.rating.store import Choice, Judgement, Settings

FEW = 20
"""With fewer prompts the bootstrap's interval is known to be too narrow, and the summary says so."""
SCORES: Mapping[Choice, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""What a rating is worth for A. A skip is worth nothing to anybody: it is left out."""
CODES: Mapping[Choice, int] = {"a": 0, "b": 1, "tie": 2, "both_bad": 3}


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha."""

    alpha: float | None
    """None: undefined (see ``shared``, or all values are the same, so that chance alone would agree as well)."""
    shared: int
    """Questions (of scales: answers) that two raters or more have judged."""


@dataclass(frozen=True)
class RaterSummary:
    """One rater."""

    name: str
    counts: dict[str, int]
    """Choice -> how often, gold questions left out."""
    gold_right: int
    gold_answered: int
    """Gold questions answered in any way but skip."""
    left_share: float | None
    """Share of the left answer among left and right, gold questions too; far from one half: a habit, not a judgement."""


@dataclass(frozen=True)
class ScaleSummary:
    """Marks on one scale, means over prompts; ``difference`` is A less B, paired."""

    a: Interval
    b: Interval
    difference: Interval
    agreement: Agreement


@dataclass(frozen=True)
class Summary:
    """What the ratings of a file say. Gold questions count in the raters' gold shares alone."""

    label_a: str
    label_b: str
    questions: int
    prompts: int
    """Prompts with a judgement other than skip."""
    counts: dict[str, int]
    win_rate: Interval | None
    """Of A, over prompts; ties and both bad count half, skips not at all. None: nothing was judged."""
    agreement: Agreement
    raters: tuple[RaterSummary, ...]
    scales: dict[str, ScaleSummary]

    def text(self) -> str:
        """Give the summary as text, a few lines."""
        return fill("rating", "summary.txt.jinja", escaped=False, s=self, few=FEW).rstrip("\n")


def summarize(judgements: Sequence[Judgement], questions: int, settings: Settings) -> Summary:
    """Sum up the ratings of a file; ``questions`` is the number of questions that are not gold."""
    asked = [one for one in judgements if not one.question.gold]
    scores = prompt_means(asked, lambda one: SCORES.get(one.choice))
    names = dict.fromkeys(one.rater for one in judgements)
    marked = any(one.marks is not None for one in asked)
    return Summary(
        label_a=settings.label_a,
        label_b=settings.label_b,
        questions=questions,
        prompts=len(scores),
        counts=_counts(asked),
        win_rate=mean_interval(scores) if len(scores) else None,
        agreement=choice_agreement(asked),
        raters=tuple(_rater(name, [one for one in judgements if one.rater == name]) for name in names),
        scales={scale: _scale(asked, scale) for scale in settings.scales if marked},
    )


def prompt_means(judgements: Iterable[Judgement], value: Callable[[Judgement], float | None]) -> Floats:
    """Mean of ``value`` for each prompt: over a question's raters first, then over the prompt's questions.

    So a question that three people rated weighs no more than one that one person did, and the prompts, which the bootstrap
    resamples, weigh alike. Judgements whose value is None are left out. ``(prompts,)`` float64, in the order of their first
    judgement.
    """
    prompts: dict[str, dict[str, list[float]]] = {}
    for one in judgements:
        found = value(one)
        if found is not None:
            questions = prompts.setdefault(json.dumps(one.question.prompt, sort_keys=True), {})
            questions.setdefault(one.question.id, []).append(found)
    return np.array([np.mean([np.mean(raters) for raters in questions.values()]) for questions in prompts.values()])


def agreement(values: Iterable[tuple[str, Hashable, int]], level: Literal["nominal", "ordinal"]) -> Agreement:
    """Krippendorff's alpha over raters (Krippendorff, Content Analysis, 2004, chapter 11): 1 is perfect, 0 is chance.

    ``values`` are ``(rater, unit, value)``; a rater need not have rated every unit, and units of one rater are left out. The
    level is nominal for choices, ordinal for marks.
    """
    given: dict[Hashable, dict[str, int]] = {}
    for rater, unit, value in values:
        given.setdefault(unit, {})[rater] = value
    shared = [by for by in given.values() if len(by) > 1]
    if len({value for by in shared for value in by.values()}) < 2:
        return Agreement(None, len(shared))
    raters = sorted({rater for by in shared for rater in by})
    table = np.array([[by.get(rater, np.nan) for by in shared] for rater in raters], dtype=np.float64)
    return Agreement(float(krippendorff.alpha(reliability_data=table, level_of_measurement=level)), len(shared))


def choice_agreement(judgements: Sequence[Judgement]) -> Agreement:
    """Nominal alpha of the choices a, b, tie and both bad; a skip is no value."""
    coded = ((one.rater, one.question.id, CODES[one.choice]) for one in judgements if one.choice in CODES)
    return agreement(coded, "nominal")


def _counts(judgements: Sequence[Judgement]) -> dict[str, int]:
    found = Counter(one.choice for one in judgements)
    return {choice: found[choice] for choice in ("a", "b", "tie", "both_bad", "skip")}


def _rater(name: str, own: Sequence[Judgement]) -> RaterSummary:
    gold = [one for one in own if one.question.gold and one.choice != "skip"]
    decided = [one for one in own if one.choice in ("a", "b")]
    left = sum((one.choice == "a") == one.a_left for one in decided)
    return RaterSummary(
        name=name,
        counts=_counts([one for one in own if not one.question.gold]),
        gold_right=sum(one.choice == "a" for one in gold),
        gold_answered=len(gold),
        left_share=left / len(decided) if decided else None,
    )


def _scale(judgements: Sequence[Judgement], scale: str) -> ScaleSummary:
    def mark(one: Judgement, side: str) -> float | None:
        return None if one.marks is None else float(one.marks[side][scale])

    a, b = (prompt_means(judgements, partial(mark, side=side)) for side in ("a", "b"))
    # Each answer is a unit.
    marks = (
        (one.rater, (one.question.id, side), one.marks[side][scale])
        for one in judgements
        if one.marks is not None
        for side in ("a", "b")
    )
    return ScaleSummary(mean_interval(a), mean_interval(b), paired_difference(a, b), agreement(marks, "ordinal"))
