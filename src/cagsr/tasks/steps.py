"""Chains of thought: where the steps of an answer end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

from cagsr.config import StepsConfig
from cagsr.errors import RolloutError
from cagsr.support.dotted_path import import_function

Split = Callable[[str], list[int]]
"""From an answer's text to the characters at which its steps end, in order, the last one its length."""

_BREAKS = {
    "lines": re.compile(r"\n+"),
    "paragraphs": re.compile(r"\n[ \t]*\n\s*"),
    # A stop, a question or an exclamation mark that is followed by white space and no small letter; not one within a number.
    "sentences": re.compile(r"[.!?]+[\"')\]]*\s+(?=[^a-z\s])|\n+"),
}


def splitter(config: StepsConfig) -> Split | None:
    """How answers are cut into steps; None: not at all. ConfigError: a function that can't be imported."""
    if config.by == "none":
        return None
    if config.by == "function":
        own = import_function(str(config.function), "--steps.function")
        return partial(_most, partial(_own, own), config.most)
    pattern = re.compile(re.escape(str(config.delimiter))) if config.by == "delimiter" else _BREAKS[config.by]
    plain = partial(_at, pattern)
    return partial(_most, plain if config.tag is None else partial(_in_tag, config.tag, plain), config.most)


def _at(pattern: re.Pattern[str], text: str) -> list[int]:
    """Each step ends behind what separates it from the next."""
    return _clean(text, [match.end() for match in pattern.finditer(text)])


def _in_tag(tag: str, split: Split, text: str) -> list[int]:
    """Steps are within the tag; what follows it, the answer, is one more. Without the tag the whole is split."""
    closing = f"</{tag}>"
    end = text.find(closing)
    if end < 0:
        return split(text)
    end += len(closing)
    return _clean(text, [*split(text[:end]), end])


def _own(function: Callable[[str], Iterable[str]], text: str) -> list[int]:
    """Steps as a user's function says them, whose texts in a row are the answer."""
    try:
        steps = [str(step) for step in function(text)]
    except Exception as error:  # a user's code can raise anything; the cause stays attached
        raise RolloutError(f"--steps.function failed with {type(error).__name__}: {error}; mend it") from error
    if "".join(steps) != text:
        raise RolloutError(
            "--steps.function: the steps that it returns, one behind the other, must be the answer's text"
        )
    ends = [0]
    for step in steps:
        ends.append(ends[-1] + len(step))
    return _clean(text, ends[1:])


def _most(split: Split, most: int, text: str) -> list[int]:
    """At most so many steps: what follows is part of the last one."""
    ends = split(text)
    return ends if len(ends) <= most else [*ends[: most - 1], ends[-1]]


def _clean(text: str, ends: Iterable[int]) -> list[int]:
    """The ends in order and once each, those left out behind which nothing but white space was said."""
    places = sorted({0, len(text), *ends})
    said = [end for start, end in pairwise(places) if text[start:end].strip()]
    return [*said[:-1], len(text)] if said else [len(text)]
