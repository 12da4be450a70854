"""How far a transcript is from its reference: words skipped, invented and changed; for ``--checker`` and ``evaluation.metric``.

Words are compared as :func:`cagsr.evaluation.metrics.words` finds them: lower case, without punctuation. They are aligned by jiwer,
with as few edits as it takes (Levenshtein).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cagsr.errors import DataError
from cagsr.evaluation.metrics import words
from cagsr.prompts.references import REFERENCE_COLUMNS, texts_of
from cagsr.support.extras import require

NAMES = ("word_error_rate", "skipped_words", "invented_words", "changed_words")


def word_errors(
    prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> list[dict[str, float | None]]:
    """Of each answer ``skipped_words`` (deletions), ``invented_words`` (insertions), ``changed_words`` (substitutions), and
    ``word_error_rate``, their sum over the words of the reference.

    References are in the first of the columns ``references``, ``reference`` and ``completion`` that there is; of several, the
    one with the lowest rate counts. None where a row has none. DataError where no row has such a column.
    """
    require("Word errors", "audio", modules=["jiwer"])
    column = next((name for name in REFERENCE_COLUMNS if name in columns), None)
    if column is None:
        raise DataError(
            f"word_errors: the rows have none of the columns {', '.join(REFERENCE_COLUMNS)}; give a transcript."
        )
    return [
        min(
            (_errors(text, reference) for reference in texts_of(own) if words(reference)),
            key=lambda one: one["word_error_rate"] or 0.0,
            default=dict.fromkeys(NAMES),
        )
        for text, own in zip(completions, columns[column], strict=True)
    ]


def word_accuracy(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
    """1 less the word error rate, so that higher is better; below 0 where there are more errors than words."""
    rates = [one["word_error_rate"] for one in word_errors(prompts, completions, **columns)]
    return [None if rate is None else 1.0 - rate for rate in rates]


def _errors(text: str, reference: str) -> dict[str, float | None]:
    import jiwer

    found = jiwer.process_words(" ".join(words(reference)), " ".join(words(text)))
    counts = found.wer, found.deletions, found.insertions, found.substitutions
    return dict(zip(NAMES, map(float, counts), strict=True))
