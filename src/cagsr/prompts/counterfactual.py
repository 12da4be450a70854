"""Prompts in which one thing is another: a phrase swapped for one of its kind, read off the other prompts.

No label takes part. A phrase is a run of words that state something with nothing but single spaces between them; phrases are of a
kind when the same word stands before them (``area[city centre]``, ``area[riverside]``).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from cagsr.flow import Prompt
from cagsr.prompts.find_words import Word, find_words
from cagsr.prompts.stating_words import StatingWords


@dataclass(frozen=True)
class Phrase:
    """The characters ``[start, end)`` of a prompt."""

    start: int
    end: int
    kind: str
    """The word before it, case-folded; empty at the beginning."""


@dataclass(frozen=True)
class Swapped:
    """A prompt with one phrase swapped."""

    text: str
    lost: frozenset[str]
    """Words, case-folded, that the true prompt says and this one does not."""
    phrase: Phrase | None = None
    """What was swapped, in the true prompt."""


class Counterfactuals:
    """Swaps phrases of prompts for those of the same kind in other prompts of a set."""

    def __init__(self, prompts: Iterable[Prompt], stating: StatingWords) -> None:
        self.stating = stating
        found: dict[str, set[str]] = defaultdict(set)
        for prompt in prompts:
            for phrase in self.phrases(prompt):
                found[phrase.kind].add(prompt.text[phrase.start : phrase.end])
        self._kinds = {kind: tuple(sorted(texts)) for kind, texts in found.items()}

    def phrases(self, prompt: Prompt) -> list[Phrase]:
        """The phrases of a prompt, in order; what a template says is none."""
        found: list[Phrase] = []
        run: list[Word] = []
        before = ""
        last = ""
        for word in [*find_words(prompt.text, prompt.template), None]:
            goes_on = bool(run) and word is not None and prompt.text[run[-1].end : word.start] == " "
            if run and not (goes_on and word is not None and word.key in self.stating.words):
                found.append(Phrase(run[0].start, run[-1].end, before))
                run = []
            if word is None:
                break
            if word.key in self.stating.words:
                if not run:
                    before = last
                run.append(word)
            last = word.key
        return found

    def of(self, prompt: Prompt, answer: str, count: int, draw: random.Random) -> list[Swapped]:
        """At most ``count`` prompts, each with another phrase swapped that says a word of the ``answer`` and of no other phrase."""
        said = {word.key for word in find_words(answer)}
        own = {word.key for word in find_words(prompt.text, prompt.template)}
        found: list[Swapped] = []
        phrases = self.phrases(prompt)
        draw.shuffle(phrases)
        for phrase in phrases:
            if len(found) == count:
                break
            text = prompt.text[phrase.start : phrase.end]
            if not said & {word.key for word in find_words(text)} & self.stating.words:
                continue
            others = [one for one in self._kinds.get(phrase.kind, ()) if one.casefold() != text.casefold()]
            if not others:
                continue
            swapped = prompt.text[: phrase.start] + draw.choice(others) + prompt.text[phrase.end :]
            # Template ranges behind the phrase move, and are words of every prompt: none of them is lost.
            lost = own - {word.key for word in find_words(swapped)}
            if lost & said:
                found.append(Swapped(swapped, frozenset(lost), phrase))
        return found


def held_words(prompt: Prompt) -> frozenset[str]:
    """The words that a prompt says, case-folded, outside its template."""
    return frozenset(word.key for word in find_words(prompt.text, prompt.template))
