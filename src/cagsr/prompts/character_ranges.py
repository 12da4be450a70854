"""Character ranges of a text, and what becomes of them when passages are cut out of it."""

from collections.abc import Sequence
from itertools import accumulate

Range = tuple[int, int]


def overlaps(start: int, end: int, ranges: Sequence[Range]) -> bool:
    """Whether the half-open range ``[start, end)`` shares a character with any of ``ranges``."""
    return any(start < other_end and other_start < end for other_start, other_end in ranges)


def not_empty(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The ranges that hold a character."""
    return tuple((start, end) for start, end in ranges if start < end)


def outside(length: int, ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Return the parts of ``[0, length)`` that none of ``ranges`` touches, in order."""
    gaps, cursor = [], 0
    for start, end in sorted(ranges):
        if start > cursor:
            gaps.append((cursor, start))
        cursor = max(cursor, end)
    if cursor < length:
        gaps.append((cursor, length))
    return tuple(gaps)


def cut(text: str, cuts: Sequence[Range], *ranges: Sequence[Range]) -> tuple[str, tuple[tuple[Range, ...], ...]]:
    """Remove the passages ``cuts`` from ``text`` and move every list of ranges along.

    Returns the shorter text and, for each argument in ``ranges``, its ranges in the new text, as many as before; a
    range that was cut away whole is empty (start equals end).
    """
    kept = outside(len(text), cuts)
    inside = bytearray(len(text))
    for start, end in kept:
        inside[start:end] = b"\x01" * (end - start)
    moved = [0, *accumulate(inside)]  # moved[i]: how many kept characters come before character i
    shorter = "".join(text[start:end] for start, end in kept)
    return shorter, tuple(tuple((moved[start], moved[end]) for start, end in one) for one in ranges)
