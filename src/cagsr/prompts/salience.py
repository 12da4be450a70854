"""Salience: how much each word of a prompt matters, and which salient word each token is a piece of."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from cagsr.config import SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, Prompt, Spoken
from cagsr.prompts.character_ranges import overlaps
from cagsr.prompts.code_words import code_words
from cagsr.prompts.encode import Tokens
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
    """Different prompts counted (N)."""
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
    ``uniform``: 1 for every word; ``spans``: 1 for every word that shares a character with a marked passage. Each times the
    weight of who said it (``user_weight`` and the like; a plain prompt is the user's), times ``turn_decay`` for every exchange
    since. DataError, which ``where`` (file and row) opens, if no word matters: the prompt is all template, says boilerplate
    only, or marks nothing.
    """
    found = _weighed(prompt, config, frequency, where)
    told = [
        SalientWord(one.word, weight)
        for one in found
        if (weight := one.weight * _of_speaker(prompt.spoken, one.word, config)) > 0
    ]
    if not told:
        raise DataError(
            f"{where}: no word that matters is left under the weights of roles and turns (--salience.user_weight, "
            "--salience.assistant_weight, --salience.other_weight, --salience.turn_decay); raise one, or remove the row."
        )
    return told


def _of_speaker(spoken: Sequence[Spoken], word: Word, config: SalienceConfig) -> float:
    """What a word's weight is multiplied with for who said it, and when; one that a template moved is the user's, and new."""
    told = next((one for one in spoken if one.start < word.end and word.start < one.end), None)
    if told is None:
        return config.user_weight
    return config.role_weight(told.role) * config.turn_decay**told.age


def _weighed(prompt: Prompt, config: SalienceConfig, frequency: DocumentFrequency, where: str) -> list[SalientWord]:
    """The words that matter, whoever said them."""
    words = list(find_words(prompt.text, prompt.template))
    if not words:
        raise DataError(
            f"{where}: the prompt holds no word, only "
            f"{'template markers and punctuation' if prompt.template else 'punctuation or special tokens'}; "
            "there is nothing an answer could attend to: remove the row or write a prompt with words."
        )
    if config.code:
        words = code_words(prompt.text, words)
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


def words_of_tokens(
    prompt: Prompt, tokens: Tokens, salient: Sequence[SalientWord], config: SalienceConfig, where: str
) -> EncodedPrompt:
    """Give every token the index of the salient word it belongs to, and every index its weight.

    The rules, in the order in which they apply:

    - Special tokens, tokens that are white space only and, with ``skip_sink``, the first token belong to no word.
    - A word split into several tokens counts once: all its tokens carry its index.
    - A token that spans several words belongs to the first salient one.
    - A word that gets no token of its own this way merges with the word its token belongs to: covering that token
      covers both, so the weights add up.
    - The same word twice in a prompt is ONE salient word with one weight, the largest of its occurrences': all its tokens
      carry one index, and looking at either occurrence covers it.
    - A word whose only tokens are special, or the skipped first token, drops out.

    Indices run from 0 in the order of first occurrence. DataError, which ``where`` opens, where no salient word is left.
    """
    owners = [_owner(index, tokens, salient, config.skip_sink) for index in range(len(tokens.ids))]
    index_of: dict[str, int] = {}
    weights: list[float] = []
    for owner in owners:
        if owner is None:
            continue
        index = index_of.setdefault(salient[owner].word.key, len(weights))
        if index == len(weights):
            weights.append(salient[owner].weight)
        weights[index] = max(weights[index], salient[owner].weight)
    merged: set[str] = set()
    for word, weight in salient:
        if word.key in index_of or word.key in merged:
            continue
        overlapping = zip(tokens.offsets, owners, strict=True)  # a token that the word shares with another one
        host = next((own for (a, b), own in overlapping if own is not None and a < word.end and word.start < b), None)
        if host is not None:
            weights[index_of[salient[host].word.key]] += weight
            merged.add(word.key)
    if not weights:
        raise DataError(
            f"{where}: no token of the prompt belongs to a word that matters"
            + (
                " (the first token is left out as the attention sink; --salience.no_skip_sink keeps it)"
                * config.skip_sink
            )
            + "; remove the row or lengthen the prompt."
        )
    words = tuple(-1 if owner is None else index_of[salient[owner].word.key] for owner in owners)
    return EncodedPrompt(prompt=prompt, ids=tokens.ids, words=words, salience=tuple(weights))


def _owner(index: int, tokens: Tokens, salient: Sequence[SalientWord], skip_sink: bool) -> int | None:
    """Find the first salient word that token ``index`` shares a character with; None: it belongs to none."""
    if tokens.special[index] or tokens.blank[index] or (skip_sink and index == 0):
        return None
    start, end = tokens.offsets[index]
    number = bisect_right(salient, start, key=lambda one: one.word.end)  # words are in order and don't overlap
    return number if number < len(salient) and salient[number].word.start < end else None


def explain_salience(encoded: EncodedPrompt, tokenizer: Any) -> list[tuple[str, float]]:
    """Return the salient words of a prompt with their weights, in the order of their first occurrence.

    A word is shown as the text of its tokens at its first occurrence, so that words that share a token, and pieces
    that a tokenizer glues to a word, show as what they are to the model.
    """
    shown: dict[int, str] = {}
    for word, run in groupby(zip(encoded.words, encoded.ids, strict=True), key=lambda pair: pair[0]):
        if word >= 0 and word not in shown:
            shown[word] = tokenizer.decode([token for _, token in run]).strip()
    return [(shown[index], weight) for index, weight in enumerate(encoded.salience)]
