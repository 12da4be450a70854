"""Which tokens say the same: ``The``, ``▁The`` and ``▁the`` are three ids and one text.

A tokenizer has a piece of text under several ids: with the space before it and without, large and small, as a whole word
and as the end of one. What an answer copies from its prompt rarely stands in the same place there (``name[The`` and
``at The``), so whoever asks whether two tokens say the same compares them by text.
"""

from __future__ import annotations

import unicodedata

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SPACE_MARKS = "▁Ġ "
"""What sentencepiece and byte-level vocabularies write for the space before a piece, where no decoder turns it into one."""
ANCHOR = "a"
"""A piece is decoded behind this one: alone it would count as the beginning of a text, where ``##ing`` keeps its mark."""


def text_ids(tokenizer: PreTrainedTokenizerBase, size: int = 0) -> Tensor:
    """Give every token the lowest id of those that say the same.

    Two tokens say the same when their texts are equal without white space at their ends and in lower case
    (``str.casefold``). Pieces of a character that stands for several tokens are equal when their bytes are. Compared by id
    alone are tokens that say no word or part of one: special tokens, white space, punctuation (a dash between words is not
    the hyphen of ``family-friendly``), and ids that no token has.

    Args:
        tokenizer: a fast tokenizer, whatever its kind.
        size: ids that the model can say; a vocabulary may be padded beyond what the tokenizer knows.

    Returns:
        ``(ids,)`` int64, the longer of ``size`` and the tokenizer's vocabulary; ``text_ids[i] == text_ids[j]``
        exactly where the tokens i and j say the same. 262,144 tokens take about a second.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    apart = {int(number) for number in tokenizer.all_special_ids}
    apart |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = torch.arange(max(size, 1 + max(vocabulary.values(), default=-1)), dtype=torch.int64)
    decoder = getattr(tokenizer, "backend_tokenizer").decoder  # noqa: B009  of fast tokenizers only
    lowest: dict[str, int] = {}
    numbers, same = [], []
    for piece, number in sorted(vocabulary.items(), key=lambda one: one[1]):
        if number in apart:
            continue
        bare = piece.lstrip(SPACE_MARKS)
        text = bare if decoder is None else decoder.decode([ANCHOR, piece]).removeprefix(ANCHOR)
        # Unfinished characters all decode to one and the same sign: the piece itself stands for its bytes.
        said = "\0" + bare if UNFINISHED in text else text.strip().casefold()
        if UNFINISHED in text or _is_word(said):
            numbers.append(number)
            same.append(lowest.setdefault(said, number))
    found[numbers] = torch.tensor(same, dtype=torch.int64)
    return found


def _is_word(text: str) -> bool:
    """Whether a text holds anything but white space, punctuation and control characters."""
    return text.isalnum() or any(unicodedata.category(character)[0] in "LNSM" for character in text)
