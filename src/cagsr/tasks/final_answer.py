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
    if (marked := _marked(text)) is not None:
        return marked
    if said := list(_SAID.finditer(text)):
        return said[-1][1].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _marked(text: str) -> str | None:
    found = [(match.start(), match[1]) for pattern in _MARKED for match in pattern.finditer(text)]
    found += list(_boxed(text))
    return max(found)[1].strip() if found else None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers where both hold just one (``$1,000.00`` is ``1000``), else as texts whatever
    their case, white space and last stop.
    """
    first, second = _as_number(one), _as_number(other)
    if first is not None and second is not None:
        return first == second
    return _as_text(one) == _as_text(other)


def is_right(completion: str, reference: object) -> bool:
    """Whether an answer ends at what the reference ends at: ``reference`` is a worked solution of several lines or with a mark, or
    the bare answer, all of it.
    """
    own, given = final_answer(completion), str(reference).strip()
    worked = "\n" in given or _marked(given) is not None
    wanted = (final_answer(given) if worked else None) or given
    return own is not None and same_answer(own, wanted)


def _boxed(text: str) -> Iterator[tuple[int, str]]:
    r"""The contents of ``\boxed{...}``, braces within it balanced."""
    for match in re.finditer(r"\\boxed\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            yield match.start(), text[match.end() : end - 1]


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
