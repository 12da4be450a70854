"""The final answer of a chain of thought, and whether it is the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")
_MARKED = (
    re.compile(r"####\s*([^\n]+)"),  # GSM8K
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
)
_SAID = re.compile(r"(?:final answer|the answer)\s*(?:is|:|=)\s*\**\s*([^\n]+?)\**\s*\.?\s*(?:\n|\Z)", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    r"""What a text ends at: the last ``#### x``, ``<answer>x</answer>`` or ``\boxed{x}``, else what it says the answer is, else its
    last number; None where there is none.
    """
    span = final_answer_span(text)
    return None if span is None else text[slice(*span)]


def final_answer_span(text: str) -> tuple[int, int] | None:
    """Where :func:`final_answer` stands in a text, the characters ``[start, end)``; None where there is none."""
    if (marked := _marked(text)) is not None:
        return marked
    found = [match.span(1) for match in _SAID.finditer(text)] or [match.span() for match in _NUMBER.finditer(text)]
    return _bare(text, *found[-1]) if found else None


def _marked(text: str) -> tuple[int, int] | None:
    found = [match.span(1) for pattern in _MARKED for match in pattern.finditer(text)]
    found += list(_boxed(text))
    return _bare(text, *max(found)) if found else None


def _bare(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the white space at its ends."""
    found = text[start:end]
    return start + len(found) - len(found.lstrip()), end - len(found) + len(found.rstrip())


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers where both hold just one (``$1,000.00`` is ``1000``), else as texts whatever
    their case, white space and last stop.
    """
    first, second = _as_number(one), _as_number(other)
    if first is not None and second is not None:
        return first == second
    return _as_text(one) == _as_text(other)


def is_right(completion: str, reference: object) -> bool:
    """Whether an answer ends at what the reference ends at (:func:`result_of`)."""
    own = final_answer(completion)
    return own is not None and same_answer(own, result_of(reference))


def result_of(reference: object) -> str:
    """What a reference ends at: it is a worked solution of several lines or with a mark, or the bare answer, all of it."""
    given = str(reference).strip()
    worked = "\n" in given or _marked(given) is not None
    return (final_answer(given) if worked else None) or given


def _boxed(text: str) -> Iterator[tuple[int, int]]:
    r"""The contents of ``\boxed{...}``, braces within it balanced."""
    for match in re.finditer(r"\\boxed\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            yield match.end(), end - 1


def _as_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    if len(found) != 1:
        return None
    try:
        return Decimal(found[0].replace(",", ""))
    except InvalidOperation:
        return None


def _as_text(text: str) -> str:
    return " ".join(text.split()).strip(" .").casefold()
