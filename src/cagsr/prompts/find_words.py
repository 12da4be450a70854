"""Split a text into words: the units that salience weighs and attention is pooled over."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import regex

from cagsr.prompts.character_ranges import outside

# Scripts written without spaces: a run of their letters is a clause, so each character stands for itself.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"(?:(?![{UNSPACED}])[\p{{L}}\p{{N}}]\p{{M}}*)"
_WORD = regex.compile(
    rf"(?=[\p{{L}}\p{{N}}])[{UNSPACED}]\p{{M}}*"
    rf"|\p{{Sc}}?{_LETTER}+(?:(?:['’\-‐_&@]|(?<=\p{{N}})[.,:/](?=\p{{N}}))\p{{Sc}}?{_LETTER}+)*[%°]?"
)


class Word(NamedTuple):
    """One occurrence of a word in a text, the characters ``[start, end)``."""

    start: int
    end: int
    key: str
    """What makes two occurrences the same word: the case-folded text, typographic apostrophes straightened."""


def find_words(text: str, template: Sequence[tuple[int, int]] = ()) -> Iterator[Word]:
    """Find the words of ``text`` in order, those of the character ranges ``template`` left out.

    A word is a maximal run of letters and digits with what holds it together: apostrophes, hyphens, underscores and
    the like inside it (``didn't``, ``ice-cream``, ``eat_type``), points and commas between digits (``3.5``), a currency
    sign before and a per-cent sign after (``£20-25``, ``50%``). Other punctuation and white space are no words. In
    scripts written without spaces (Chinese, Japanese, Thai, ...) each character is a word. No word reaches across the
    border of a template range.
    """
    for start, end in outside(len(text), template):
        for match in _WORD.finditer(text, start, end):
            yield Word(match.start(), match.end(), match.group().casefold().replace("’", "'").replace("‐", "-"))
