"""What ratings say: who wins how often, with an interval, and whether the raters agree. Pure functions of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal

import krippendorff
import numpy as np
from numpy.typing import NDArray

from cagsr.rating.store import Choice, Judgement

Floats = NDArray[np.float64]

SCORES: Mapping[Choice, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""What a rating is worth for A. A skip is worth nothing to anybody: it is left out."""
CODES: Mapping[Choice, int] = {"a": 0, "b": 1, "tie": 2, "both_bad": 3}


def prompt_means(judgements: Iterable[Judgement], value: Callable[[Judgement], float | None]) -> Floats:
    """Mean of ``value`` for each prompt: over a question's raters first, then over the prompt's questions.

    So a question that three people rated weighs no more than one that one person did, and the prompts, which the bootstrap
    resamples, weigh alike. Judgements whose value is None are left out.

    Returns:
        ``(prompts,)`` float64, in the order of their first judgement; empty where nothing is left.
    """
    prompts: dict[str, dict[str, list[float]]] = {}
    for one in judgements:
        found = value(one)
        if found is not None:
            questions = prompts.setdefault(json.dumps(one.question.prompt, sort_keys=True), {})
            questions.setdefault(one.question.id, []).append(found)
    return np.array([np.mean([np.mean(raters) for raters in questions.values()]) for questions in prompts.values()])


def win_score(judgement: Judgement) -> float | None:
    """Give 1 for A, 0 for B, one half for a tie and for both bad, None for a skip."""
    return SCORES.get(judgement.choice)


def mark_of(judgement: Judgement, side: Literal["a", "b"], scale: str) -> float | None:
    """Give the mark of one side on a scale, None where there is none."""
    return None if judgement.marks is None else float(judgement.marks[side][scale])


def agreement(
    values: Iterable[tuple[str, Hashable, int]], level: Literal["nominal", "ordinal"]
) -> tuple[float | None, int]:
    """Krippendorff's alpha over raters (Krippendorff, Content Analysis, 2004, chapter 11): 1 is perfect, 0 is chance.

    Args:
        values: ``(rater, unit, value)``; a rater need not have rated every unit, and units of one rater are left out.
        level: nominal for choices, ordinal for marks.

    Returns:
        Alpha and the number of units that two raters or more have rated. Alpha is None where there is no such unit, or where
        all their values are the same, so that chance alone would agree as well.
    """
    given: dict[Hashable, dict[str, int]] = {}
    for rater, unit, value in values:
        given.setdefault(unit, {})[rater] = value
    shared = [by for by in given.values() if len(by) > 1]
    if len({value for by in shared for value in by.values()}) < 2:
        return None, len(shared)
    raters = sorted({rater for by in shared for rater in by})
    table = np.array([[by.get(rater, np.nan) for by in shared] for rater in raters], dtype=np.float64)
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level)), len(shared)


def choice_agreement(judgements: Sequence[Judgement]) -> tuple[float | None, int]:
    """Nominal alpha of the choices a, b, tie and both bad; a skip is no value."""
    return agreement(
        ((one.rater, one.question.id, CODES[one.choice]) for one in judgements if one.choice in CODES), "nominal"
    )


def mark_agreement(judgements: Sequence[Judgement], scale: str) -> tuple[float | None, int]:
    """Ordinal alpha of the marks on a scale; each answer is a unit."""
    return agreement(
        (
            (one.rater, (one.question.id, side), one.marks[side][scale])
            for one in judgements
            if one.marks is not None
            for side in ("a", "b")
        ),
        "ordinal",
    )
