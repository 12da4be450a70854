"""Which words of a Python prompt say something: names, and the text of strings and comments; not keywords and numbers."""

import io
import keyword
import tokenize
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from cagsr.prompts.find_words import Word

_TEXT = frozenset(
    number for number, name in tokenize.tok_name.items() if name in ("STRING", "COMMENT", "FSTRING_MIDDLE")
)


def code_words(text: str, words: Sequence[Word]) -> list[Word]:
    """Those of the words of ``text`` that are names, or stand in strings (docstrings) and comments.

    The text is read by Python's own tokenizer as far as it is Python; behind that (a prompt may stop anywhere) a keyword is no
    word, and all others are.
    """
    lines = [0, *accumulate(len(line) for line in text.split("\n"))]
    lines = [start + number for number, start in enumerate(lines)]  # the line breaks
    tokens: list[tuple[int, int, int]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            start, end = (lines[row - 1] + column for row, column in (token.start, token.end))
            tokens.append((start, end, token.type))
    except (tokenize.TokenError, SyntaxError):  # the code goes on behind the prompt, or is none
        pass
    starts = [start for start, _, _ in tokens]

    def kept(word: Word) -> bool:
        place = bisect_right(starts, word.start) - 1
        kind = tokens[place][2] if place >= 0 and word.start < tokens[place][1] else None
        if kind in _TEXT:
            return True
        return kind != tokenize.NUMBER and not keyword.iskeyword(text[word.start : word.end])

    return [word for word in words if kept(word)]
