"""How good a one-sentence summary is where no checker exists: ROUGE against all references, and what it makes up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from cagsr.evaluation.metrics import rouge

_WORD = regex.compile(r"\p{L}[\p{L}\p{M}\p{N}]*|\p{N}+(?:[.,]\p{N}+)*")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def report(
    prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]], **columns: Any
) -> list[dict[str, float]]:
    """ROUGE-1 and -2, best over the references, ROUGE-1, -2 and -L, mean over them, and invented numbers and names.

    For ``--checker``; ROUGE-L, best over the references, is measured always.
    """
    found = []
    for prompt, text, own in zip(prompts, completions, references, strict=True):
        one, two, longest = (rouge(text, own, kind) for kind in ("rouge1", "rouge2", "rougeL"))
        numbers, names = invented(prompt, text)
        found.append(
            {
                "rouge_1": max(one),
                "rouge_2": max(two),
                "rouge_1_mean": float(np.mean(one)),
                "rouge_2_mean": float(np.mean(two)),
                "rouge_l_mean": float(np.mean(longest)),
                "invented": float(len(numbers) + len(names)),
                "invented_numbers": float(len(numbers)),
                "invented_names": float(len(names)),
            }
        )
    return found


@dataclass(frozen=True)
class Stated:
    """A number or a name in a summary, the characters ``[start, end)``."""

    start: int
    end: int
    number: bool
    """Else a name."""
    held: bool
    """The abstract holds it."""


def invented(prompt: str, text: str) -> tuple[set[str], set[str]]:
    """The numbers and the names of a summary that its abstract doesn't hold, each once."""
    made_up = [one for one in stated(prompt, text) if not one.held]
    numbers, names = ({text[one.start : one.end] for one in made_up if one.number is kind} for kind in (True, False))
    return numbers, names


def stated(prompt: str, text: str) -> Iterator[Stated]:
    """The numbers and the names of a summary, in order, and whether its abstract holds them.

    An abbreviation in capitals is held by words that begin with its letters, ``CNNs`` by ``convolutional neural networks``.

    A number is written in digits; ``2`` is held by ``two``. A name is a word with a capital or a digit in it (``GAN``,
    ``ImageNet``, ``L2``), at the start of a sentence only one with a capital or digit behind its first letter. Capitals and a
    plural's ``s`` make no difference to what is held.
    """
    words = _WORD.findall(prompt)
    held = {_plain(word) for word in words}
    held |= {str(number) for number, word in enumerate(_NUMBERS) if word in held}
    initials = "".join(word[0] for word in words).casefold()
    for match in _WORD.finditer(text):
        word = match.group()
        letters = word.removesuffix("s")
        abbreviates = len(letters) > 1 and letters.isupper() and letters.casefold() in initials
        before = text[: match.start()].rstrip()
        starts = not before or before[-1] in ".!?:"
        number = word[0].isnumeric()
        if number or any(char.isupper() or char.isnumeric() for char in word[starts:]):
            yield Stated(match.start(), match.end(), number, _plain(word) in held or abbreviates)


def _plain(word: str) -> str:
    folded = word.casefold().replace(",", "")
    return folded.removesuffix("s") if len(folded) > 2 else folded
