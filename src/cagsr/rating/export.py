"""Ratings as preference pairs in TRL's format, which ``cagsr reward-model`` and ``cagsr dpo`` take as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cagsr.rating.rating_questions import RatingQuestion
from cagsr.rating.store import Judgement

REASONS = {
    "tie": "ties",
    "both_bad": "both bad",
    "skip": "skipped",
    "no_majority": "questions without a majority",
    "empty": "with an empty answer, which no reward model reads",
}


@dataclass(frozen=True)
class Exported:
    """Preference pairs, and what gave none."""

    rows: tuple[dict[str, Any], ...]
    left_out: Mapping[str, int]
    """Reason (a key of ``REASONS``) -> how many ratings, of no_majority and empty: how many pairs."""

    def sentence(self) -> str:
        """Say what was written and what was not."""
        out = [f"{count:,} {REASONS[reason]}" for reason, count in self.left_out.items() if count]
        return f"{len(self.rows):,} preference pairs; left out: {', '.join(out) or 'nothing'}."


def preference_pairs(judgements: Sequence[Judgement], votes: Literal["majority", "each"]) -> Exported:
    """Turn ratings into rows ``{"prompt", "chosen", "rejected"}``; gold questions are no data and stay out.

    majority: one row for each question where more than half of those who did not skip prefer the same answer. each: one row
    for each rating that prefers an answer. A conversation's answers become one message of the assistant each.
    """
    asked = [one for one in judgements if not one.question.gold]
    left_out = {reason: sum(one.choice == reason for one in asked) for reason in REASONS}
    preferred = [(one.question, str(one.choice)) for one in asked if one.choice in ("a", "b")]
    rows = []
    for question, choice in preferred if votes == "each" else _majority(asked, left_out):
        if not question.a.strip() or not question.b.strip():
            left_out["empty"] += 1
            continue
        answers: list[Any] = [question.a, question.b] if choice == "a" else [question.b, question.a]
        if not isinstance(question.prompt, str):
            answers = [[{"role": "assistant", "content": text}] for text in answers]
        rows.append({"prompt": question.prompt, "chosen": answers[0], "rejected": answers[1]})
    return Exported(tuple(rows), left_out)


def _majority(judgements: Sequence[Judgement], left_out: dict[str, int]) -> list[tuple[RatingQuestion, str]]:
    """The side that most raters prefer, for the questions that have one; counts those that have none."""
    questions: dict[str, list[Judgement]] = {}
    for one in judgements:
        if one.choice != "skip":
            questions.setdefault(one.question.id, []).append(one)
    found = []
    for own in questions.values():
        winner = next((side for side in ("a", "b") if 2 * sum(one.choice == side for one in own) > len(own)), None)
        if winner is not None:
            found.append((own[0].question, winner))
        elif len(own) > 1:  # a single rater's tie is counted as one already
            left_out["no_majority"] += 1
    return found
