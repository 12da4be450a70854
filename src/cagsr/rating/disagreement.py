"""What people are asked so that few judgements say most about the reward: pairs on which its terms disagree."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cagsr.config import DataConfig
from cagsr.errors import DataError
from cagsr.prompts.load import Row, load_rows
from cagsr.rating.rating_questions import RatingQuestion, RatingQuestions, kept_questions, prompt_of

Candidates = Sequence[Mapping[str, Any]]


def questions_by_disagreement(path: str, count: int) -> RatingQuestions:
    """The ``count`` prompts of a file of ``cagsr rank`` with the pair of answers that its terms disagree most about.

    A term's say is the difference of its values in its own deviation within prompts; a pair counts for as much as the weaker
    side of its terms has together (a term that is worse when larger is turned round by its correlation with the reward).
    DataError for a row that ``cagsr rank`` did not write, and where no terms disagree.
    """
    rows = load_rows(DataConfig(path=path), [])
    ranked = [(row, _candidates(row)) for row in rows]
    scales = term_scales([candidates for _, candidates in ranked])
    found = []
    for row, candidates in ranked:
        pairs = list(combinations(candidates, 2))
        scores = disagreement(np.array([differences(a, b, scales) for a, b in pairs]))
        most = int(scores.argmax())
        if scores[most] > 0:
            a, b = (str(one["completion"]) for one in pairs[most])
            found.append((float(scores[most]), RatingQuestion(prompt_of(row), a, b)))
    if not found:
        raise DataError(f"{path}: the terms agree on every pair; rank with a reward of two terms or more.")
    found.sort(key=lambda one: -one[0])
    return kept_questions([question for _, question in found[:count]], 0)


def term_scales(rankings: Sequence[Candidates]) -> dict[str, float]:
    """Signed factor of each term: 1 over its deviation within prompts, negative where the reward falls with it; no flat ones."""
    names = rankings[0][0]["terms"] if rankings else {}
    found = {}
    for name in names:
        moved, together = [], 0.0
        for candidates in rankings:
            values = [one["terms"].get(name) for one in candidates]
            if any(value is None or not math.isfinite(value) for value in values):
                continue
            mean = sum(values) / len(values)
            reward = sum(one["reward"] for one in candidates) / len(candidates)
            moved += [value - mean for value in values]
            together += sum(
                (value - mean) * (one["reward"] - reward) for value, one in zip(values, candidates, strict=True)
            )
        deviation = math.sqrt(sum(value * value for value in moved) / len(moved)) if moved else 0.0
        if deviation > 1e-9:
            found[name] = math.copysign(1.0 / deviation, together)
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any], scales: Mapping[str, float]) -> list[float]:
    """What each term says for one of two answers, in deviations: above 0 where it is better; 0 of a term that doesn't apply."""
    says = [(a["terms"].get(name), b["terms"].get(name), scale) for name, scale in scales.items()]
    return [0.0 if x is None or y is None else (x - y) * scale for x, y, scale in says]


def disagreement(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(pairs,)`` how much the terms together say for one of two answers *and* for the other: the smaller of the two sums.

    ``differences`` ``(pairs, terms)``: above 0 where the first answer is better.
    """
    return np.minimum(differences.clip(min=0).sum(axis=1), -differences.clip(max=0).sum(axis=1))


def _candidates(row: Row) -> Candidates:
    where = f"{row.source}, row {row.number}"
    candidates = row.values.get("candidates")
    whole = isinstance(candidates, list) and len(candidates) >= 2
    if not whole or not all(
        isinstance(one, Mapping) and {"completion", "reward", "terms"} <= one.keys() for one in candidates or ()
    ):
        raise DataError(f"{where}: no candidates with their terms; give a file that cagsr rank wrote.")
    return candidates or ()
