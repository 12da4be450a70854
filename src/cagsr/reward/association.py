"""Associations: which words of an answer go with which words of its prompt, learned from the model's own answers.

Over many unlabelled prompts ``kid`` is said where the prompt holds ``familyFriendly yes`` and hardly elsewhere. How strongly two
words go together is their phi coefficient (Yule, 1912: the Pearson correlation of two yes-or-no variables) over answers of the
starting model, learned once before the first step, so that a policy can't move it. A prompt word counts as covered when a word
that goes with it is said, and a word of the answer as unsupported when nothing that it goes with is in the prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from cagsr.errors import DataError
from cagsr.flow import EpisodeBatch
from cagsr.prompts.find_words import find_words

FORMAT = "phi of prompt n-grams and answer words"
DENSE_UP_TO = 2**22
"""Entries (32 MiB)."""


def prompt_features(text: str, template: Sequence[tuple[int, int]] = ()) -> tuple[frozenset[str], frozenset[str]]:
    """Words of a prompt, and these with its pairs of neighbouring words (with a space); case-folded, without the chat template.

    Pairs tell ``rating low`` from ``price low``.
    """
    words = [word.key for word in find_words(text, template)]
    return frozenset(words), frozenset(words).union(f"{a} {b}" for a, b in pairwise(words))


def answer_features(text: str) -> frozenset[str]:
    """Words of an answer, case-folded."""
    return frozenset(word.key for word in find_words(text))


@dataclass(frozen=True)
class Associations:
    """Strengths between what a prompt holds and what an answer says; see :func:`learn_associations`."""

    prompt_index: Mapping[str, int]
    """Row of each prompt word or pair that occurred often enough."""
    answer_index: Mapping[str, int]
    """Column of each answer word that occurred often enough."""
    strength: csr_array
    """``(prompt features, answer words)`` float64: phi where it reaches the floor, else 0."""
    common: frozenset[str]
    """Prompt words in so many prompts that nothing tells them apart: boilerplate, which weighs nothing."""
    rare: float
    """What a prompt word too rare to have a row weighs: the phi of being said literally, see ``learn_associations``."""
    answers: int
    """Answers it was learned from."""

    @cached_property
    def best_of_prompt(self) -> NDArray[np.float64]:
        """``(prompt features,)`` the strongest phi of each prompt feature: 0 where the model never tells it apart."""
        return _largest(self.strength, axis=1)

    @cached_property
    def best_of_answer(self) -> NDArray[np.float64]:
        """``(answer words,)`` the strongest phi of each answer word: 0 for words that go with nothing."""
        return _largest(self.strength, axis=0)

    def coverage(self, prompt: str, completion: str, template: Sequence[tuple[int, int]] = ()) -> float:
        """Associated coverage: ``sum_w max_{v in answer} phi(w, v) / sum_w max_v phi(w, v)`` over the prompt's features, in [0, 1].

        Prompt words too rare for a row are covered when they are said literally, and weigh ``rare``. 0 for a prompt of which
        nothing goes with anything.
        """
        words, features = prompt_features(prompt, template)
        said = answer_features(completion)
        rows = self._known(features, self.prompt_index)
        columns = self._known(said, self.answer_index)
        unknown = [word for word in words - self.common if word not in self.prompt_index]
        covered = float(self._strongest_between(rows, columns, axis=1).sum())
        covered += self.rare * sum(word in said for word in unknown)
        possible = float(self.best_of_prompt[rows].sum()) + self.rare * len(unknown)
        return covered / possible if possible > 0 else 0.0

    def unsupported(self, prompt: str, completion: str, template: Sequence[tuple[int, int]] = ()) -> float:
        """Share of what the answer says that nothing in the prompt goes with, in [0, 1].

        ``sum_v (max_w phi(w, v) - max_{w in prompt} phi(w, v)) / sum_v max_w phi(w, v)`` over the answer's words ``v``, each
        counted once: words that go with nothing in particular (``the``, ``is``) weigh nothing, and a long answer is
        not worse than a short one for its length. 0 for an answer of which no word goes with anything.
        """
        words, features = prompt_features(prompt, template)
        said = answer_features(completion)
        rows = self._known(features, self.prompt_index)
        columns = self._known(said - words, self.answer_index)
        weights = float(self.best_of_answer[self._known(said, self.answer_index)].sum())
        if weights == 0:
            return 0.0
        found = self._strongest_between(rows, columns, axis=0)
        return float((self.best_of_answer[columns] - found).sum()) / weights

    def strongest(self, prompt_feature: str, count: int = 5) -> list[tuple[str, float]]:
        """The answer words that go with a prompt word or pair, strongest first; empty for one without a row."""
        if prompt_feature not in self.prompt_index:
            return []
        row = self.strength[[self.prompt_index[prompt_feature]]].toarray()[0]
        words = list(self.answer_index)
        order = np.argsort(-row, kind="stable")[:count]
        return [(words[number], float(row[number])) for number in order if row[number] > 0]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form, which :meth:`from_json` reads; it names what it is."""
        entries = self.strength.tocoo()
        return {
            "format": FORMAT,
            "answers": self.answers,
            "rare": self.rare,
            "common": sorted(self.common),
            "prompt_features": list(self.prompt_index),
            "answer_words": list(self.answer_index),
            "entries": [
                [int(row), int(column), float(value)]
                for row, column, value in zip(*entries.coords, entries.data, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> Associations:
        """Read what :meth:`to_json` wrote; DataError for something else."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(value["format"])
            rows, columns = value["prompt_features"], value["answer_words"]
            entries = np.asarray(value["entries"], dtype=np.float64).reshape(-1, 3)
            places = (entries[:, 0].astype(np.int64), entries[:, 1].astype(np.int64))
            matrix = coo_array((entries[:, 2], places), shape=(len(rows), len(columns))).tocsr()
            common = frozenset(map(str, value["common"]))
            return cls(_numbered(rows), _numbered(columns), matrix, common, float(value["rare"]), int(value["answers"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                'An association file holds "prompt_features", "answer_words" and "entries", as cagsr writes it.'
            ) from error

    @cached_property
    def _dense(self) -> NDArray[np.float64] | None:
        """The strengths as an array where that is small: picking rows and columns of it is ten times faster."""
        rows, columns = self.strength.shape
        return self.strength.toarray() if rows * columns <= DENSE_UP_TO else None

    def _strongest_between(self, rows: list[int], columns: list[int], axis: int) -> NDArray[np.float64]:
        """Largest strength of each of ``columns`` (axis 0) or ``rows`` (axis 1) among the others, 0 where there is none."""
        if self._dense is None or not rows or not columns:
            return _largest(self.strength[rows][:, columns], axis)
        return np.asarray(self._dense[np.ix_(rows, columns)].max(axis=axis))

    @staticmethod
    def _known(features: Iterable[str], index: Mapping[str, int]) -> list[int]:
        return sorted(index[feature] for feature in features if feature in index)


def learn_associations(
    prompts: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    completions: Sequence[str],
    *,
    min_count: int = 5,
    floor: float = 0.2,
) -> Associations:
    """Learn which answer words go with which prompt words from prompts (text and template ranges) and a model's answer to each.

    For a prompt feature ``w`` in ``n_w`` and an answer word ``v`` in ``n_v`` of ``N`` answers, together in ``n_wv``:
    ``phi = (N n_wv - n_w n_v) / sqrt(n_w (N - n_w) n_v (N - n_v))``; smaller ones than ``floor`` (in (0, 1]) are 0. Features that
    occur, or are lacking, in fewer than ``min_count`` (>= 1) different prompts have no phi, nor have words of so few answers, nor
    pairs that were seen together fewer than ``min(3, min_count)`` times, since with few counts chance alone gives large values.
    Words of prompts below ``min_count`` (names, mostly) can only be said literally: of a word that is said in a share ``c`` of the
    answers to its prompt and nowhere else, phi is about ``sqrt(c)``, so that is what they weigh, ``c`` being their common share.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} answers")
    if min_count < 1 or not 0 < floor <= 1:
        raise ValueError(f"min_count {min_count} must be at least 1 and floor {floor} in (0, 1]")
    asked = [prompt_features(text, template) for text, template in prompts]
    said = [answer_features(text) for text in completions]
    total = len(said)
    # A prompt that was answered several times is one prompt: its own words are no more frequent for that.
    distinct = {(text, tuple(template)): own for (text, template), own in zip(prompts, asked, strict=True)}.values()
    prompt_counts = Counter(feature for _, features in distinct for feature in features)
    prompt_index = _frequent(prompt_counts, len(distinct), min_count)
    answer_index = _frequent(Counter(word for words in said for word in words), total, min_count)
    x = _incidence([features for _, features in asked], prompt_index)
    y = _incidence(said, answer_index)
    together = (x.T @ y).tocoo()
    row, column = together.coords
    n_x, n_y = np.asarray(x.sum(axis=0)).ravel(), np.asarray(y.sum(axis=0)).ravel()
    seen = together.data >= min(3, min_count)
    row, column, both = row[seen], column[seen], together.data[seen]
    spread = np.sqrt(n_x[row] * (total - n_x[row]) * n_y[column] * (total - n_y[column]))
    phi = (total * both - n_x[row] * n_y[column]) / spread
    strong = phi >= floor
    matrix = coo_array((phi[strong], (row[strong], column[strong])), shape=(len(prompt_index), len(answer_index)))
    literal = [
        word in answer
        for (words, _), answer in zip(asked, said, strict=True)
        for word in words
        if prompt_counts[word] < min_count
    ]
    rare = math.sqrt(sum(literal) / len(literal)) if literal else 0.0
    everywhere = frozenset(
        word for words, _ in asked for word in words if prompt_counts[word] > len(distinct) - min_count
    )
    return Associations(prompt_index, answer_index, matrix.tocsr(), everywhere - prompt_index.keys(), rare, total)


def by_text(measure: Callable[[str, str, Sequence[tuple[int, int]]], float], episodes: EpisodeBatch) -> Tensor:
    """``(batch,)`` float32: a measure of prompt and answer, as texts, of each row."""
    pairs = zip(episodes.prompts.prompts, episodes.completions, strict=True)
    values = [measure(prompt.text, completion, prompt.template) for prompt, completion in pairs]
    return torch.tensor(values, dtype=torch.float32, device=episodes.sampled.device)


def _frequent(counts: Mapping[str, int], total: int, least: int) -> dict[str, int]:
    """Number the features that occur, and are lacking, often enough; in alphabetical order, whatever the hash seed."""
    return _numbered(sorted(name for name, count in counts.items() if least <= count <= total - least))


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _incidence(sets: Sequence[frozenset[str]], index: Mapping[str, int]) -> csr_array:
    """``(answers, features)`` float64, 1 where the answer or prompt has the feature."""
    places = [(row, index[name]) for row, names in enumerate(sets) for name in names if name in index]
    rows, columns = (
        (np.array(part, dtype=np.int64) for part in zip(*places, strict=True)) if places else (np.zeros(0, int),) * 2
    )
    return coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(sets), len(index))).tocsr()


def _largest(matrix: csr_array, axis: int) -> NDArray[np.float64]:
    """Maximum along an axis of a matrix >= 0, 0 where there is nothing."""
    if matrix.shape[axis] == 0 or matrix.shape[1 - axis] == 0:
        return np.zeros(matrix.shape[1 - axis])
    return np.asarray(matrix.max(axis=axis).todense(), dtype=np.float64).ravel()
