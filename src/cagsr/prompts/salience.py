"""Salience: how much each word of a prompt matters.

Template markers are excluded by :func:`cagsr.prompts.find_words.find_words`; special tokens, padding and the attention sink
by :mod:`cagsr.prompts.word_tokens`, where words meet tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from cagsr.config import SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import Prompt
from cagsr.prompts.character_ranges import overlaps
from cagsr.prompts.find_words import Word, find_words


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many prompts of a set each word occurs; gives the inverse document frequency (IDF) of a word.

    ``idf(w) = ln((N + 1) / df(w))`` with ``N`` prompts and ``df(w)`` the number of prompts that hold ``w``
    (case-folded; a prompt counts once however often it says the word). This is the classic ``ln(N / df)`` (Spärck
    Jones, 1972) with one prompt more in the numerator: a word in every prompt of a large set still goes to 0 as
    ``1 / N``, yet with one prompt, or with identical ones, all words keep the same positive weight and nothing has to
    fall back. A word the set has never seen counts as seen once, the largest IDF there is.
    """

    documents: int
    """Number of different prompts counted (N)."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Word (case-folded) -> number of prompts that hold it."""

    @classmethod
    def fit(cls, prompts: Iterable[Prompt]) -> DocumentFrequency:
        """Count the words of ``prompts`` outside their templates.

        A prompt that stands several times counts once, so that a file with many answers to a prompt weighs words as a
        file of the prompts does.
        """
        counts: Counter[str] = Counter()
        seen: set[str] = set()
        for prompt in prompts:
            if prompt.text not in seen:
                seen.add(prompt.text)
                counts.update({word.key for word in find_words(prompt.text, prompt.template)})
        return cls(len(seen), dict(counts))

    def idf(self, word: str) -> float:
        """Inverse document frequency of ``word`` (its case-folded key), natural logarithm, > 0."""
        return math.log((self.documents + 1) / self.counts.get(word, 1))

    @cached_property
    def largest(self) -> float:
        """The largest IDF of a word of the set; ``ln(N + 1)`` where some word occurs in one prompt only."""
        return math.log((self.documents + 1) / min(self.counts.values(), default=1))

    def boilerplate(self, floor: float) -> list[str]:
        """Return the words whose IDF lies below ``floor`` times the largest, the commonest first."""
        below = [word for word in self.counts if self.idf(word) < floor * self.largest]
        return sorted(below, key=lambda word: (-self.counts[word], word))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form, which :meth:`from_json` reads; it names its formula."""
        return {"formula": "ln((documents + 1) / count)", "documents": self.documents, "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DocumentFrequency:
        """Read what :meth:`to_json` wrote; raises DataError when ``value`` is something else."""
        documents, counts = value.get("documents"), value.get("counts")
        if not isinstance(documents, int) or not isinstance(counts, Mapping):
            raise DataError('An IDF table must hold "documents" and "counts", as cagsr train writes it.')
        return cls(documents, {str(word): int(count) for word, count in counts.items()})


class SalientWord(NamedTuple):
    """An occurrence of a word with a weight above zero."""

    word: Word
    weight: float


def salient_words(
    prompt: Prompt, config: SalienceConfig, frequency: DocumentFrequency, where: str
) -> list[SalientWord]:
    """Weigh the words of ``prompt`` that matter, in order of their occurrence, with their weights.

    ``idf``: the word's IDF to the power ``idf_power``, words below ``idf_floor`` times the largest left out;
    ``uniform``: 1 for every word;
    ``spans``: 1 for every word that shares a character with a marked passage. ``where`` (file and row) opens the
    messages.

    Raises:
        DataError: no word matters: the prompt is empty but for its template, says boilerplate only, or marks nothing.
    """
    words = list(find_words(prompt.text, prompt.template))
    if not words:
        raise DataError(
            f"{where}: the prompt holds no word, only "
            f"{'template markers and punctuation' if prompt.template else 'punctuation or special tokens'}; "
            "there is nothing an answer could attend to: remove the row or write a prompt with words."
        )
    if config.weighting == "uniform":
        return [SalientWord(word, 1.0) for word in words]
    if config.weighting == "spans":
        if prompt.spans is None:
            raise DataError(
                f"{where}: no passage of the prompt is marked, but --salience.weighting is spans; mark it "
                "(--salience.markers or --data.spans_column) or choose --salience.weighting idf."
            )
        marked = [SalientWord(word, 1.0) for word in words if overlaps(word.start, word.end, prompt.spans)]
        if not marked:
            raise DataError(f"{where}: the marked passages of the prompt hold no word; mark at least one word.")
        return marked
    floor = config.idf_floor * frequency.largest
    weighted = [SalientWord(word, frequency.idf(word.key)) for word in words]
    kept = [word for word in weighted if word.weight > 0 and word.weight >= floor]
    if not kept:
        raise DataError(
            f"{where}: every word of the prompt occurs in so many prompts that none weighs anything; "
            "lower --salience.idf_floor, choose --salience.weighting uniform, or remove the row."
        )
    return [SalientWord(word.word, word.weight**config.idf_power) for word in kept]
