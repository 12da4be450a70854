"""The slot checker: which facts of a meaning representation a text says, misses, adds or gets wrong.

Facts are found by fixed phrasings, after the approach of Dušek, Howcroft & Rieser, "Semantic Noise Matters for Neural
Natural Language Generation" (INLG 2019), with phrasings of our own. A value and its number count as one meaning, as the
human references use them: ``cheap`` and ``less than £20``, ``low`` and ``1 out of 5``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from examples.e2e.facts import SLOTS, Fact, parse
from examples.e2e.phrasings import FAMILY, LOOSE, MEANING_OF, MEANINGS, NAMES, NEARS, NOT_FAMILY

_PATTERNS = {
    slot: {meaning: re.compile(phrasings) for meaning, phrasings in meanings.items()}
    for slot, meanings in MEANINGS.items()
}
_FAMILY = re.compile(FAMILY)
_NOT_FAMILY = re.compile(NOT_FAMILY)
_MASK = "§"


@dataclass(frozen=True)
class SlotReport:
    """What a text does with the facts it was asked to say."""

    facts: int
    """Facts of the prompt."""
    missed: tuple[Fact, ...]
    """Facts of the prompt that the text doesn't say."""
    wrong: tuple[Fact, ...]
    """Those of ``missed`` instead of which the text says another value of the same slot."""
    added: tuple[Fact, ...]
    """Facts that the text says of slots the prompt doesn't name, or besides the right value."""

    @property
    def hits(self) -> float:
        """Share of the prompt's facts that the text says."""
        return 1.0 - len(self.missed) / self.facts


def check(meaning: str | Sequence[Fact], text: str) -> SlotReport:
    """Compare a text with the facts it should say; ``meaning`` is a prompt, a meaning representation or its facts.

    Raises ValueError where the meaning representation can't be read.
    """
    facts = parse(meaning) if isinstance(meaning, str) else tuple(meaning)
    said = find_facts(text, facts)
    missed: list[Fact] = []
    wrong: list[Fact] = []
    added: list[Fact] = []
    for slot in SLOTS:
        wanted = [value for name, value in facts if name == slot]
        others = [found for found in said[slot] if not any(_agrees(slot, found, value) for value in wanted)]
        unsaid = [value for value in wanted if not any(_agrees(slot, found, value) for found in said[slot])]
        missed += [(slot, value) for value in unsaid]
        wrong += [(slot, value) for value in unsaid[: len(others)]]
        added += [(slot, found) for found in others[len(unsaid) :]]
    return SlotReport(len(facts), tuple(missed), tuple(wrong), tuple(added))


def find_facts(text: str, wanted: Sequence[Fact] = ()) -> dict[str, list[str]]:
    """Every meaning said in ``text``, by slot; proper names of ``wanted`` are looked for besides the known ones."""
    named = {value: slot for slot, value in wanted if slot in ("name", "near")}
    plain, found_names = _mask_names(_fold(text), text, tuple(named))
    said: dict[str, list[str]] = {slot: [] for slot in SLOTS}
    for name in found_names:
        said[named.get(name, "near" if name in NEARS else "name")].append(name)
    for slot, patterns in _PATTERNS.items():
        said[slot] = [meaning for meaning, pattern in patterns.items() if pattern.search(plain)]
    negated = [match.span() for match in _NOT_FAMILY.finditer(plain)]
    if negated:
        said["familyFriendly"].append("no")
    if any(not any(a <= word.start() < b for a, b in negated) for word in _FAMILY.finditer(plain)):
        said["familyFriendly"].append("yes")
    return said


def _agrees(slot: str, found: str, wanted: str) -> bool:
    meaning = MEANING_OF.get(wanted, wanted)
    return found == meaning or meaning in LOOSE.get((slot, found), ())


def _fold(text: str) -> str:
    """Lower case, without accents, with plain quotes and single spaces."""
    plain = unicodedata.normalize("NFD", text.replace("’", "'").replace("‘", "'"))
    return " ".join("".join(char for char in plain if not unicodedata.combining(char)).lower().split())


def _mask_names(plain: str, text: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """Replace proper names by a mask, longest first, and say which were there.

    A wanted name counts however it is capitalised and without its article; a name nobody asked for only as a name is
    written, so that "a ranch" is no landmark.
    """
    found = []
    for name in sorted({*wanted, *NAMES, *NEARS}, key=lambda name: (name not in wanted, -len(name))):
        folded = _fold(name)
        loose = folded.removeprefix("the ")
        if name in wanted:
            pattern = rf"\b(?:the )?{re.escape(loose)}\b"
        elif name.split()[-1] in text:
            pattern = rf"\b{re.escape(folded)}\b"
        else:
            continue
        plain, count = re.subn(pattern, _MASK, plain)
        if count:
            found.append(name)
    return plain, found
