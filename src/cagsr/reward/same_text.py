"""Whether a token of the answer says what a token of the prompt says, piece by piece or word by word."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch
from cagsr.models.texts import TokenTexts

LONGEST = 16
"""Tokens of the longest word that is looked for as a whole."""


def same_text(texts: TokenTexts, episodes: EpisodeBatch) -> Tensor:
    """Which sampled tokens of each answer say what a salient token of its context says: ``(batch, response, context)`` bool."""
    return says(texts, episodes.ids, episodes.sampled, episodes.context_ids, episodes.words)


def says(texts: TokenTexts, response_ids: Tensor, mask: Tensor, prompt_ids: Tensor, words: Tensor) -> Tensor:
    """Which response tokens say what a salient prompt token says, ``(batch, response, prompt)`` bool.

    Either the two tokens have the same text; or the response token is part of a run of tokens that together say the whole
    word which the prompt token is a piece of, however the two are split. Such a run begins and ends where words do: ``2``,
    ``0`` of ``120`` do not say ``20``. White space and punctuation inside it say nothing (``family-friendly``, ``family
    friendly``).

    Ids are ``(batch, response)`` and ``(batch, prompt)`` int64, ``mask`` marks real response tokens, ``words`` is the
    salient word of each prompt token, -1 for none.
    """
    salient = words >= 0
    same = texts.ids[response_ids][:, :, None] == texts.ids[prompt_ids][:, None, :]
    same &= mask[:, :, None] & salient[:, None, :]
    count = int(words.max()) + 1 if words.numel() else 0
    if count == 0 or mask.shape[1] == 0:
        return same
    known, wanted = _words(texts, prompt_ids, words, count)
    whole = torch.zeros(*mask.shape, count, dtype=torch.bool, device=mask.device)  # (batch, response, words)
    holds_text = texts.power[response_ids] != 1
    opens, closes = texts.opens[response_ids], texts.closes[response_ids]
    yes = torch.ones_like(mask[:, :1])
    # What stands before an answer is somebody else's: its first token begins a word, whatever that ends with.
    begins = mask & holds_text & (opens | torch.cat([yes, closes[:, :-1] | ~mask[:, :-1]], dim=1))
    ends = mask & holds_text & (closes | torch.cat([opens[:, 1:] | ~mask[:, 1:], yes], dim=1))
    for length, run in _runs(texts, response_ids):
        last = length - 1
        there = (
            begins[:, : mask.shape[1] - last] & ends[:, last:]
        )  # a real token's run ends with one: masks have no holes
        found = (run[:, :, None] == wanted[:, None, :]) & there[:, :, None] & known[:, None, :]
        for place in range(length):
            whole[:, place : place + found.shape[1]] |= found
    index = words.clamp(min=0)[:, None, :].expand_as(same)
    return same | (whole.gather(2, index) & salient[:, None, :])


def _words(texts: TokenTexts, ids: Tensor, words: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which salient words are known as a whole and their hashes, ``(batch, words)`` bool and int64."""
    salient = words >= 0
    edge = torch.ones_like(salient[:, :1])
    apart = words[:, 1:] != words[:, :-1]
    starts, stops = salient & torch.cat([edge, apart], dim=1), salient & torch.cat([apart, edge], dim=1)
    # One place more than words, for what is no word.
    known = torch.zeros(len(ids), count + 1, dtype=torch.bool, device=ids.device)
    hashes = torch.zeros(len(ids), count + 1, dtype=torch.int64, device=ids.device)
    going = starts
    for length, run in _runs(texts, ids):
        last = length - 1
        going = going[:, : run.shape[1]]
        whole = going & stops[:, last:] & (run != 0)
        place = torch.where(whole, words[:, last:], count)
        known.scatter_(1, place, True)
        hashes.scatter_(1, place, run)
        going = going & ~stops[:, last:]
    return known[:, :count], hashes[:, :count]


def _runs(texts: TokenTexts, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each length the hashes of that many tokens from each place on, ``(batch, places)``."""
    hashes, powers = texts.hash[ids], texts.power[ids]
    run = hashes
    for length in range(1, min(LONGEST, ids.shape[1]) + 1):
        if length > 1:
            run = run[:, :-1] * powers[:, length - 1 :] + hashes[:, length - 1 :]
        yield length, run
