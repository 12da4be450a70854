"""Varied copies of the training pairs: other values in the meaning representation and, alike, in the sentence.

The data name twenty restaurants, each with its own habits ("The Mill" is near "The Sorrento"), and a small model learns the
habits by heart. Copies with other names and values teach it to read the prompt instead. Only the training pairs and
their own values are used, and made-up names; nothing of the test set.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from examples.e2e.facts import Fact, Inventory, made_up_name
from examples.e2e.slots import check

_SWAPPED = ("name", "eatType", "food", "priceRange", "customer rating", "near")


def vary(
    facts: Sequence[Fact], text: str, inventory: Inventory, generator: random.Random, share: float = 0.6
) -> tuple[tuple[Fact, ...], str] | None:
    """A copy in which about ``share`` of the values that the text says literally are others.

    None where no value changed or the copy doesn't say all its facts, and only these, by the slot checker.
    """
    changed: list[Fact] = []
    for slot, value in facts:
        pattern = re.compile(rf"\b(an? )?(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)
        if slot in _SWAPPED and pattern.search(text) and generator.random() < share:
            new = _other_value(slot, inventory, generator)
            text = _put(pattern, new, text)
            text = re.sub(r"\bthe The\b", "The", text)
            value = new
        changed.append((slot, value))
    result = tuple(changed)
    report = check(result, text)
    if result == tuple(facts) or len(set(result)) < len(result) or report.missed or report.added:
        return None
    return result, text


def _put(pattern: re.Pattern[str], new: str, text: str) -> str:
    """Replace the value, and its article: "an English pub" becomes "a Chinese pub"."""
    return pattern.sub(lambda match: (_article(match[1], new) if match[1] else "") + new, text)


def _article(old: str, new: str) -> str:
    article = "an " if new[0] in "AEIOUaeiou" else "a "
    return article.capitalize() if old[0] == "A" else article


def _other_value(slot: str, inventory: Inventory, generator: random.Random) -> str:
    if slot in ("name", "near") and generator.random() < 0.5:
        return made_up_name(generator)
    return generator.choice(list(inventory.values[slot]))
