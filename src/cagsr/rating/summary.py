"""The ratings of a file in numbers, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cagsr.evaluation.intervals import Interval, mean_interval, paired_difference
from cagsr.html_page import templates
from cagsr.rating.rating_statistics import choice_agreement, mark_agreement, mark_of, prompt_means, win_score
from cagsr.rating.store import Judgement, Settings

FEW = 20
"""With fewer prompts the bootstrap's interval is known to be too narrow, and the summary says so."""


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha."""

    alpha: float | None
    """None: undefined (see ``shared``, or all values are the same)."""
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
    """Marks on one scale, means over prompts."""

    a: Interval
    b: Interval
    difference: Interval
    """A less B, paired."""
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
        text: str = templates("rating", html=False).get_template("summary.txt.jinja").render(s=self, few=FEW)
        return text.rstrip("\n")


def summarize(judgements: Sequence[Judgement], questions: int, settings: Settings) -> Summary:
    """Sum up the ratings of a file; ``questions`` is the number of questions that are not gold."""
    asked = [one for one in judgements if not one.question.gold]
    scores = prompt_means(asked, win_score)
    names = dict.fromkeys(one.rater for one in judgements)
    return Summary(
        label_a=settings.label_a,
        label_b=settings.label_b,
        questions=questions,
        prompts=len(scores),
        counts=_counts(asked),
        win_rate=mean_interval(scores) if len(scores) else None,
        agreement=Agreement(*choice_agreement(asked)),
        raters=tuple(_rater(name, [one for one in judgements if one.rater == name]) for name in names),
        scales={
            scale: _scale(asked, scale) for scale in settings.scales if any(one.marks is not None for one in asked)
        },
    )


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
    a = prompt_means(judgements, lambda one: mark_of(one, "a", scale))
    b = prompt_means(judgements, lambda one: mark_of(one, "b", scale))
    return ScaleSummary(
        mean_interval(a), mean_interval(b), paired_difference(a, b), Agreement(*mark_agreement(judgements, scale))
    )
