"""Words that state something: a prompt of the set says them, and not every prompt does.

What an answer says beside them (``is``, ``located``) can hardly be wrong; of these its own prompt holds some and others not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cagsr.prompts.find_words import Word, find_words
from cagsr.prompts.salience import DocumentFrequency

FLOOR = 0.1
"""Words whose IDF over the prompts is below this share of the largest state nothing."""


@dataclass(frozen=True)
class StatingWords:
    """The words of a set of prompts, but those with an IDF below ``floor`` times the largest: most prompts hold them."""

    frequency: DocumentFrequency
    floor: float = FLOOR

    @cached_property
    def words(self) -> frozenset[str]:
        """They, case-folded."""
        return frozenset(self.frequency.counts) - frozenset(self.frequency.boilerplate(self.floor))

    def of(self, text: str) -> list[Word]:
        """Those that a text says, in order, each occurrence."""
        return [word for word in find_words(text) if word.key in self.words]

    def support(self, prompt: str, answer: str, template: Sequence[tuple[int, int]] = ()) -> tuple[float, int]:
        """Share of the different stating words of an answer that its own prompt holds, and how many they are; 1 and 0 of none."""
        said = {word.key for word in self.of(answer)}
        held = {word.key for word in find_words(prompt, template)}
        return (len(said & held) / len(said) if said else 1.0), len(said)
