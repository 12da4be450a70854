"""Where words meet tokens: which salient word each token is a piece of, and what the words are as the model sees them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from cagsr.config import SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.prompts.encode import Tokens
from cagsr.prompts.salience import SalientWord


def words_of_tokens(
    prompt: Prompt, tokens: Tokens, salient: Sequence[SalientWord], config: SalienceConfig, where: str
) -> EncodedPrompt:
    """Give every token the index of the salient word it belongs to, and every index its weight.

    The rules, in the order in which they apply:

    - Special tokens, tokens that are white space only and, with ``skip_sink``, the first token belong to no word.
    - A word split into several tokens counts once: all its tokens carry its index.
    - A token that spans several words belongs to the first salient one.
    - A word that gets no token of its own this way merges with the word its token belongs to: covering that token
      covers both, so the weights add up.
    - The same word twice in a prompt is ONE salient word with one weight: all its tokens carry one index, and looking
      at either occurrence covers it.
    - A word whose only tokens are special, or the skipped first token, drops out.

    Indices run from 0 in the order of first occurrence. ``where`` (file and row) opens the message.

    Raises:
        DataError: no salient word is left.
    """
    owners = [_owner(index, tokens, salient, config.skip_sink) for index in range(len(tokens.ids))]
    index_of: dict[str, int] = {}
    weights: list[float] = []
    for owner in owners:
        if owner is not None and salient[owner].word.key not in index_of:
            index_of[salient[owner].word.key] = len(weights)
            weights.append(salient[owner].weight)
    merged: set[str] = set()
    for word, weight in salient:
        if word.key in index_of or word.key in merged:
            continue
        host = _host(word.start, word.end, tokens, owners)
        if host is not None:
            weights[index_of[salient[host].word.key]] += weight
            merged.add(word.key)
    if not weights:
        raise DataError(
            f"{where}: no token of the prompt belongs to a word that matters"
            + (
                " (the first token is left out as the attention sink; --salience.no_skip_sink keeps it)"
                * config.skip_sink
            )
            + "; remove the row or lengthen the prompt."
        )
    words = tuple(-1 if owner is None else index_of[salient[owner].word.key] for owner in owners)
    return EncodedPrompt(prompt=prompt, ids=tokens.ids, words=words, salience=tuple(weights))


def _owner(index: int, tokens: Tokens, salient: Sequence[SalientWord], skip_sink: bool) -> int | None:
    """Find the first salient word that token ``index`` shares a character with; None: it belongs to none."""
    if tokens.special[index] or tokens.blank[index] or (skip_sink and index == 0):
        return None
    start, end = tokens.offsets[index]
    number = bisect_right(salient, start, key=lambda one: one.word.end)  # words are in order and don't overlap
    return number if number < len(salient) and salient[number].word.start < end else None


def _host(start: int, end: int, tokens: Tokens, owners: Sequence[int | None]) -> int | None:
    """Find the salient word that owns a token which overlaps the characters ``[start, end)``."""
    for (token_start, token_end), owner in zip(tokens.offsets, owners, strict=True):
        if owner is not None and token_start < end and start < token_end:
            return owner
    return None


def explain_salience(encoded: EncodedPrompt, tokenizer: Any) -> list[tuple[str, float]]:
    """Return the salient words of a prompt with their weights, in the order of their first occurrence.

    A word is shown as the text of its tokens at its first occurrence, so that words that share a token, and pieces
    that a tokenizer glues to a word, show as what they are to the model.
    """
    shown: dict[int, str] = {}
    for word, run in groupby(zip(encoded.words, encoded.ids, strict=True), key=lambda pair: pair[0]):
        if word >= 0 and word not in shown:
            shown[word] = tokenizer.decode([token for _, token in run]).strip()
    return [(shown[index], weight) for index, weight in enumerate(encoded.salience)]
