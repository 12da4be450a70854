"""What each token says: ``The``, ``▁The`` and ``▁the`` are three ids and one text.

A tokenizer has a piece of text under several ids, and splits a word differently where another sign stands before it (``Pal``,
``ace`` after a bracket, ``▁Palace`` in a sentence), so whoever asks whether an answer says what its prompt says compares texts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
ANCHOR = "a"
"""A piece is decoded behind this one: alone it would count as the beginning of a text, where ``##ing`` keeps its mark."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_BASE = 6364136223846793005
"""Of the polynomial by which texts are told apart, modulo 2 ** 64; odd."""


@dataclass(frozen=True)
class TokenTexts:
    """What the tokens of a vocabulary say: texts without punctuation and white space at their ends, in lower case.

    Texts are told apart by hashes that can be joined: of the texts x and y one after the other it is ``hash(x) * power(y) +
    hash(y)``, modulo 2 ** 64.
    """

    ids: Tensor  # (ids,) int64, the lowest id of the tokens that say the same
    hash: Tensor  # (ids,) int64, of the text; 0 of none
    power: Tensor  # (ids,) int64, what a hash is multiplied with when this text follows; 1 of none
    opens: Tensor  # (ids,) bool, no word goes on into this token: it begins with a space or a sign
    closes: Tensor  # (ids,) bool, no word goes on behind it

    def to(self, device: torch.device | str) -> TokenTexts:
        """The same on another device."""
        return TokenTexts(*(table.to(device) for table in vars(self).values()))


def token_texts(tokenizer: PreTrainedTokenizerBase, size: int = 0) -> TokenTexts:
    """Read off a fast tokenizer what each of its tokens says.

    Two tokens say the same when their texts are equal without white space and punctuation at their ends and in lower case
    (``str.casefold``); pieces of a character that stands for several tokens when their bytes are. Tokens that say no word or
    part of one have no text and are equal to themselves alone: white space, punctuation, special tokens (which no word
    reaches across either), and ids that no token has.

    The tables are as long as ``size`` (ids that the model can say; a vocabulary may be padded beyond what the tokenizer knows) or
    as the tokenizer's vocabulary, whichever is longer. 262,144 tokens take a second or two.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    apart = {int(number) for number in tokenizer.all_special_ids}
    apart |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    count = max(size, 1 + max(vocabulary.values(), default=-1))
    ids, opens, closes = np.arange(count), np.ones(count, dtype=bool), np.ones(count, dtype=bool)
    decoder = getattr(tokenizer, "backend_tokenizer").decoder  # noqa: B009  of fast tokenizers only
    lowest: dict[bytes, int] = {}
    numbers: list[int] = []
    said: list[bytes] = []
    for piece, number in sorted(vocabulary.items(), key=lambda one: one[1]):
        if number in apart:
            continue
        text = piece if decoder is None else decoder.decode([ANCHOR, piece]).removeprefix(ANCHOR)
        unfinished = UNFINISHED in text
        own = _bytes_of(piece) if unfinished else _bare(text).casefold().encode()
        if own:
            numbers.append(number)
            said.append(own)
            ids[number] = lowest.setdefault(own, number)
            if decoder is not None:  # without one every token is a word of its own
                opens[number] = text[0].isspace() if unfinished else not _is_letter(text[0])
                closes[number] = not unfinished and not _is_letter(text[-1])
    hashes, powers = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
    nothing = sorted(apart | (set(range(count)) - set(vocabulary.values())))
    # A text of its own for each of them, which no word reaches across.
    hashes[nothing], powers[nothing] = _hashes([f"\0{number}".encode() for number in nothing])
    hashes[numbers], powers[numbers] = _hashes(said)
    return TokenTexts(*(torch.from_numpy(table) for table in (ids, hashes, powers, opens, closes)))


def _bytes_of(piece: str) -> bytes:
    """The bytes of a piece that holds a part of a character, without the space before it."""
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece).lstrip(b" ")
    return piece.encode()


def _bare(text: str) -> str:
    """A text without white space, punctuation and control characters at its ends."""
    if text.isalnum():
        return text
    start, end = 0, len(text)
    while start < end and unicodedata.category(text[start])[0] in "ZPC":
        start += 1
    while start < end and unicodedata.category(text[end - 1])[0] in "ZPC":
        end -= 1
    return text[start:end]


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"


def _hashes(texts: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hash and power of texts without a NUL at their end, all at once."""
    if not texts:
        return np.zeros(0, dtype=np.int64), np.ones(0, dtype=np.int64)
    padded = np.array(texts, dtype=np.bytes_)
    letters = padded.view(np.uint8).reshape(len(texts), -1)
    lengths = np.array([len(text) for text in texts])
    hashes, powers = np.zeros(len(texts), dtype=np.int64), np.ones(len(texts), dtype=np.int64)
    base = np.int64(_BASE)
    with np.errstate(over="ignore"):
        for place in range(letters.shape[1]):
            there = place < lengths
            hashes = np.where(there, hashes * base + letters[:, place].astype(np.int64) + 1, hashes)
            powers = np.where(there, powers * base, powers)
    return hashes, powers
