"""The arithmetic inside a chain of thought: which of its equations hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise


def equations(text: str) -> list[bool]:
    """Whether each equation of numbers in a text holds, in their order: ``48/2 = 24``, ``<<3*4=12>>``, ``2 + 3 = 5 + 0 = 5``.

    A number that is rounded holds to its last digit. What has names or units in it is no equation.
    """
    # White space around signs is taken out first: a pattern that allows it anywhere takes time without bound.
    plain = _AROUND.sub(
        lambda match: match.group().strip(), text.replace(",", "").replace("$", "").replace("×", "*").replace("÷", "/")
    )
    return [
        _value(left) is not None and _equal(left, right)
        for match in _EQUATION.finditer(plain)
        for left, right in _sides(match.group())
    ]


_AROUND = re.compile(r"[ \t]*[-+*/=][ \t]*|\([ \t]+|[ \t]+\)")
_TERM = r"[-+]?\(*[-+]?(?:\d+(?:\.\d+)?|\.\d+)\)*"
_SUM = rf"{_TERM}(?:[-+*/]{_TERM})*+"
_EQUATION = re.compile(rf"(?<![\w.)]){_SUM}(?:={_SUM})+(?![\w%])")
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(.))")


def _sides(equation: str) -> Iterator[tuple[str, str]]:
    """Each side with the next; two bare numbers are no work to check."""
    sides = equation.split("=")
    for left, right in pairwise(sides):
        if re.search(r"[\d)]\s*[-+*/]", left + " = " + right):
            yield left, right


def _equal(left: str, right: str) -> bool:
    first, second = _value(left), _value(right)
    if first is None or second is None:
        return False
    bare = [part.strip() for part in (left, right) if _NUMBER.fullmatch(part.strip())]
    decimals = min((len(part.partition(".")[2]) for part in bare), default=0)
    return abs(first - second) <= (0.5 * 10.0**-decimals if decimals else 0.0) + 1e-9 * max(1.0, abs(first))


def _value(text: str) -> float | None:
    """The value of sums and products of numbers; None for what is none."""
    tokens = [match[1] or match[2] for match in _TOKEN.finditer(text.strip()) if (match[1] or match[2]).strip()]
    place = 0

    def factor() -> float:
        nonlocal place
        if place >= len(tokens):
            raise ValueError
        token = tokens[place]
        place += 1
        if token in "+-":
            return factor() if token == "+" else -factor()
        if token == "(":
            value = total()
            if place >= len(tokens) or tokens[place] != ")":
                raise ValueError
            place += 1
            return value
        return float(token)

    def product() -> float:
        nonlocal place
        value = factor()
        while place < len(tokens) and tokens[place] in "*/":
            place += 1
            value = value * factor() if tokens[place - 1] == "*" else value / factor()
        return value

    def total() -> float:
        nonlocal place
        value = product()
        while place < len(tokens) and tokens[place] in "+-":
            sign = 1.0 if tokens[place] == "+" else -1.0
            place += 1
            value += sign * product()
        return value

    try:
        value = total()
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return value if place == len(tokens) else None
