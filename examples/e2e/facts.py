"""Meaning representations: the facts a restaurant description has to say, read, written and invented."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Fact = tuple[str, str]
"""One slot with its value, as ``("food", "Chinese")``. A slot can occur twice (``eatType`` pub and restaurant)."""

SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
"""The slots of E2E NLG, in the order in which every meaning representation lists them."""

_BRACKETS = re.compile(r"(\w[\w ]*)\[\s*([^\]]*?)\s*\]")
_SYLLABLES = [onset + vowel for onset in "bcdfglmnprstvz" for vowel in "aeio"]
_ENDINGS = ["", *"nrslmtx"]
_PROMPT_END = " =>"
_SEPARATOR = " | "


def parse(text: str) -> tuple[Fact, ...]:
    """Read the facts of ``name[Alimentum], area[city centre]`` or of a prompt written by ``as_prompt``.

    Raises ValueError where the text holds no known slot.
    """
    if "[" in text:
        facts = tuple((slot.strip(), value) for slot, value in _BRACKETS.findall(text))
    else:
        pieces = text.strip().removesuffix(_PROMPT_END.strip()).split(_SEPARATOR.strip())
        pairs = (piece.partition(":") for piece in pieces)
        facts = tuple((slot.strip(), value.strip()) for slot, colon, value in pairs if colon)
    if not facts or any(slot not in SLOTS for slot, _ in facts):
        raise ValueError(f"not a meaning representation of E2E NLG: {text!r}; expected name[...], area[...], ...")
    return facts


def as_prompt(facts: Iterable[Fact]) -> str:
    """Write facts as the model reads them: ``name: Alimentum | area: city centre =>``.

    Each value stands between spaces, so that its tokens are the ones of running text and a small model can copy them;
    the completion starts with the space after the arrow.
    """
    return _SEPARATOR.join(f"{slot}: {value}" for slot, value in facts) + _PROMPT_END


@dataclass(frozen=True)
class Inventory:
    """What occurs in a set of meaning representations: slot combinations and the values of each slot."""

    combinations: tuple[tuple[str, ...], ...]
    combination_counts: tuple[int, ...]
    values: dict[str, Counter[str]]


def take_inventory(meanings: Iterable[Sequence[Fact]]) -> Inventory:
    """Count slot combinations and values; meaning representations that name a slot twice are left out."""
    combinations: Counter[tuple[str, ...]] = Counter()
    values: dict[str, Counter[str]] = {slot: Counter() for slot in SLOTS}
    for facts in meanings:
        slots = tuple(slot for slot, _ in facts)
        if len(set(slots)) < len(slots):
            continue
        combinations[slots] += 1
        for slot, value in facts:
            values[slot][value] += 1
    return Inventory(tuple(combinations), tuple(combinations.values()), values)


def invent(
    inventory: Inventory,
    count: int,
    taken: Iterable[Sequence[Fact]],
    seed: int,
    flatten: float = 0.5,
    new_names: float = 0.0,
) -> list[tuple[Fact, ...]]:
    """Invent ``count`` new meaning representations, all different and none of them (in any order) in ``taken``.

    Slot combinations are drawn as often as they occur. Values are drawn with their count to the power ``flatten``:
    1 repeats the inventory, where one value of ``eatType`` holds 85 %; 0 makes every value as likely as any other. A
    share ``new_names`` of the names and landmarks is made up, as new restaurants have new names.

    Raises ValueError where that many new combinations can't be found.
    """
    generator = random.Random(seed)
    seen = {frozenset(facts) for facts in taken}
    weights = {slot: [n**flatten for n in counts.values()] for slot, counts in inventory.values.items()}
    invented: list[tuple[Fact, ...]] = []
    for _ in range(50 * count + 1000):
        if len(invented) == count:
            return invented
        slots = generator.choices(inventory.combinations, inventory.combination_counts)[0]
        facts = tuple(
            (slot, made_up_name(generator))
            if slot in ("name", "near") and generator.random() < new_names
            else (slot, generator.choices(list(inventory.values[slot]), weights[slot])[0])
            for slot in slots
        )
        if frozenset(facts) not in seen:
            seen.add(frozenset(facts))
            invented.append(facts)
    raise ValueError(f"only {len(invented)} of {count} new meaning representations found; ask for fewer")


def made_up_name(generator: random.Random) -> str:
    """A name that exists nowhere, as ``Balosa`` or ``The Memora Gis``."""
    made = [
        "".join(generator.choices(_SYLLABLES, k=generator.randint(1, 3))) + generator.choice(_ENDINGS)
        for _ in range(generator.choice((1, 1, 2)))
    ]
    name = " ".join(word.capitalize() for word in made)
    return f"The {name}" if generator.random() < 0.3 else name
