"""In which order a rater meets the questions, and which answer stands on the left: drawn from the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def draw_order(seed: int, rater: str, questions: Sequence[str]) -> list[tuple[str, bool]]:
    """Shuffle the questions' names for a rater and draw whether A stands on the left, each independently.

    The draw hangs on nothing but seed, rater and name: it is the same on every machine and for every order of ``questions``.

    Returns:
        ``(question, A is on the left)`` in the order in which they are asked.
    """
    drawn = sorted((_draw(seed, rater, question), question) for question in questions)
    return [(question, bool(digest[-1] & 1)) for digest, question in drawn]


def _draw(seed: int, rater: str, question: str) -> bytes:
    """256 random bits: the first ones place the question, the last one places its answers."""
    return hashlib.sha256(f"{seed}\0{question}\0{rater}".encode()).digest()
