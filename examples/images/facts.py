"""What a description says of a picture: facts said, missed, wrong and invented, and what is said without looking.

A fact is a property of a field's content: ``("northwest", "colour", "red")``. None of this is in a reward, but the ceiling's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from examples.images.world import COLOURS, NUMBERS, PLACES, SHAPES

Fact = tuple[str, str, str]
"""Place, property, value."""

_SHAPE = {spelled: shape for shape, many in SHAPES.items() for spelled in (shape, many)}
_MENTION = re.compile(
    rf"\b({'|'.join(PLACES)}): (?:({'|'.join(NUMBERS)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(_SHAPE)})\b"
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
    prompts: Sequence[Any],
    completions: Sequence[str],
    facts: Sequence[Sequence[str]],
    images: Sequence[Sequence[str]] = (),
    swapped: Sequence[str] = (),
    **columns: Any,
) -> list[dict[str, float | None]]:
    """What each description says, out of the facts of its picture.

    ``said``: share of the facts; ``things``: share of the fields that hold something and are spoken of; ``right``: share of what
    is stated that is right; ``wrong``: facts that another value is right for; ``invented``: facts of empty fields; ``again``:
    fields spoken of before. ``swapped`` names for
    each picture one that shares no fact with it; with the description of that one among the others there is also

    ``without_looking``: share of the picture's facts that are said when the other one is shown;
    ``kept``: share of what is stated of the picture, right or wrong, that is stated when the other one is shown.
    """
    found: list[dict[str, float | None]] = []
    described = {own[0]: stated(text) for own, text in zip(images, completions, strict=False)}
    others = [described.get(name) for name in swapped] or [None] * len(completions)
    for text, own, other in zip(completions, facts, others, strict=True):
        true, spoken = truth(own), mentions(text)
        full = {place for place, _, _ in true}
        said = {fact for one in spoken for fact in one}
        places = [next(iter(one))[0] for one in spoken]
        judged: dict[str, float | None] = {
            "said": len(said & true) / len(true),
            "things": len(full & set(places)) / len(full),
            "right": len(said & true) / len(said) if said else None,
            "wrong": float(sum(fact[0] in full for fact in said - true)),
            "invented": float(sum(fact[0] not in full for fact in said)),
            "again": float(len(places) - len(set(places))),
        }
        if other is not None:
            judged["without_looking"] = len(other & true) / len(true)
            judged["kept"] = len(other & said) / len(said) if said else None
        found.append(judged)
    return found


def said(
    prompts: Sequence[Any], completions: Sequence[str], facts: Sequence[Sequence[str]], **columns: Any
) -> list[float]:
    """Share of the facts that is said: the metric while training."""
    return [len(stated(text) & truth(own)) / len(truth(own)) for text, own in zip(completions, facts, strict=True)]


def told(
    prompts: Sequence[Any],
    completions: Sequence[Sequence[dict[str, str]]],
    facts: Sequence[Sequence[str]],
    **columns: Any,
) -> list[float]:
    """Facts said less those that are wrong or invented, out of the picture's, as a reward (TRL's form): the ceiling."""
    rewards = []
    for (message,), own in zip(completions, facts, strict=True):
        text = message["content"]
        true, found = truth(own), mentions(text)
        again = len(found) - len({next(iter(one))[0] for one in found})
        rewards.append((len(stated(text) & true) - len(stated(text) - true)) / len(true) - again / 10)
    return rewards


def random_reward(
    prompts: Sequence[Any],
    completions: Sequence[Sequence[dict[str, str]]],
    facts: Sequence[Sequence[str]],
    **columns: Any,
) -> list[float]:
    """A number between 0 and 1 that says nothing, the same for the same picture and description: the floor."""
    digests = [
        hashlib.blake2b(f"{own}\0{message['content']}".encode(), digest_size=8).digest()
        for (message,), own in zip(completions, facts, strict=True)
    ]
    return [int.from_bytes(digest, "big") / 2**64 for digest in digests]


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
