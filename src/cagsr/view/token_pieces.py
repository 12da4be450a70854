"""Token ids as the pieces of text they stand for, so that joined pieces read as the text does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8
"""Tokens that one character may be split into."""


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Give each token's text, the space before it included.

    A character that is split over several tokens (an emoji in a byte-level vocabulary) is shown by the first of them;
    the others are empty. Special tokens are texts too.
    """

    def decode(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    pieces: list[str] = []
    start = 0
    while start < len(ids):
        for width in range(1, min(LONGEST_CHARACTER, len(ids) - start) + 1):
            text = decode(ids[start : start + width])
            if UNFINISHED not in text:
                break
        else:
            width, text = 1, decode(ids[start : start + 1])
        if start > 0:
            # Many tokenizers drop the space before a piece that is decoded alone: the piece before it brings it back.
            before = decode(ids[start - 1 : start])
            both = decode(ids[start - 1 : start + width])
            if UNFINISHED not in before and both.startswith(before):
                text = both[len(before) :]
        pieces += [text, *[""] * (width - 1)]
        start += width
    return pieces
