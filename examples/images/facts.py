"""What a description says of a picture: facts said, missed, wrong and invented, and what is said without looking.

A fact is a property of a field's content: ``("northwest", "colour", "red")``. None of this is in a reward, but the ceiling's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from examples.images.world import COLOURS, NUMBERS, PLACES, SHAPES

Fact = tuple[str, str, str]
"""Place, property, value."""

_SHAPE = {spelled: shape for shape, many in SHAPES.items() for spelled in (shape, many)}
_MENTION = re.compile(
    rf"\b({'|'.join(PLACES)}): ?(?:({'|'.join(NUMBERS)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(sorted(_SHAPE, key=len, reverse=True))})\b",
    re.IGNORECASE,
)


def mentions(text: str) -> list[frozenset[Fact]]:
    """The facts that each phrase like ``northwest: two red circles`` states, in order."""
    found = []
    for place, number, colour, shape in _MENTION.findall(text.lower()):
        said = (("number", number), ("colour", colour), ("shape", _SHAPE[shape]))
        found.append(frozenset((place, kind, value) for kind, value in said if value))
    return found


def stated(text: str) -> set[Fact]:
    """The different facts of a description."""
    return {fact for one in mentions(text) for fact in one}


def truth(facts: Sequence[str]) -> set[Fact]:
    """The facts of a picture, from its row's ``facts``."""
    return {fact for said in facts for fact in stated(said)}


def checked(
    prompts: Sequence[Any], completions: Sequence[str], facts: Sequence[Sequence[str]], **columns: Any
) -> list[dict[str, float]]:
    """What each description says, out of the facts of its picture.

    ``said``: share of the facts; ``things``: share of the fields that hold something and are spoken of; ``wrong``: facts that
    another value is right for; ``invented``: facts of empty fields; ``again``: fields spoken of before.
    """
    found = []
    for text, own in zip(completions, facts, strict=True):
        true, spoken = truth(own), mentions(text)
        full = {place for place, _, _ in true}
        said = {fact for one in spoken for fact in one}
        places = [next(iter(one))[0] for one in spoken]
        found.append(
            {
                "said": len(said & true) / len(true),
                "things": len(full & set(places)) / len(full),
                "wrong": float(sum(fact[0] in full for fact in said - true)),
                "invented": float(sum(fact[0] not in full for fact in said)),
                "again": float(len(places) - len(set(places))),
            }
        )
    return found


def said(prompts: Sequence[Any], completions: Sequence[str], facts: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """Share of the facts that is said: the metric while training."""
    return [one["said"] for one in checked(prompts, completions, facts)]


def told(prompts: Sequence[Any], completions: Sequence[str], facts: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """The same less what is wrong or invented, as a reward: the ceiling."""
    return [
        one["said"] - (one["wrong"] + one["invented"]) / len(truth(own)) - one["again"] / 10
        for one, own in zip(checked(prompts, completions, facts), facts, strict=True)
    ]


def without_looking(shown: str, swapped: str, facts: Sequence[str]) -> dict[str, float]:
    """What two descriptions have in common, the second one made with another picture shown, which shares no fact with the first.

    ``said_swapped``: share of the first picture's facts that the second description says; ``kept``: share of what the first
    description states, right or wrong, that the second one states too.
    """
    first, second, true = stated(shown), stated(swapped), truth(facts)
    return {
        "said_swapped": len(second & true) / len(true),
        "kept": len(first & second) / len(first) if first else 0.0,
    }


def swaps(facts: Sequence[Sequence[str]]) -> list[int]:
    """For each picture another one of the list, which shares no fact with it: the next one round that does not.

    Raises ValueError where a picture has none.
    """
    true = [truth(own) for own in facts]
    found = []
    for number, own in enumerate(true):
        others = ((number + step) % len(true) for step in range(1, len(true)))
        other = next((one for one in others if not own & true[one]), None)
        if other is None:
            raise ValueError(f"picture {number} shares a fact with every other one; give more pictures")
        found.append(other)
    return found
