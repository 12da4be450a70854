"""Whose answers are better in the eyes of a judge that neither model was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def win_rates(scores: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """Share of the pairs of answers to each prompt, one of either model, in which the first scores higher.

    Every answer of the one is held against every answer of the other; a tie counts half.

    Args:
        scores: ``(answers,)`` for each prompt.
        others: the same prompts' for the other model; the number of answers may differ.

    Returns:
        ``(prompts,)`` float64, between 0 and 1; NaN where a side has no score that is a number.
    """
    found = np.full(len(scores), np.nan)
    for number, (mine, theirs) in enumerate(zip(scores, others, strict=True)):
        mine, theirs = mine[np.isfinite(mine)], theirs[np.isfinite(theirs)]
        if len(mine) and len(theirs):
            found[number] = np.mean(0.5 * (1 + np.sign(mine[:, None] - theirs[None, :])))
    return found
