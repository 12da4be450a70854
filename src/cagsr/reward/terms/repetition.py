"""Repetition: the share of an answer's n-grams that it has said before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveInt
from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class RepetitionConfig(TermConfig):
    """Repetition: one minus the share of distinct n-grams."""

    weight: float = -0.3
    """Weight in the reward, negative for a penalty; 0 leaves the term out. Repetitions are rare, so that one of them weighs
    heavily once the term is brought to the common scale: small weights do."""
    n: PositiveInt = 3
    """Length of the n-grams, in tokens."""
    dense: bool = False
    """Charge each repeated n-gram at its last token instead of all at the end."""


@register
@dataclass(frozen=True)
class Repetition:
    """N-gram repetition without the stop token, :func:`ngram_repetition`.

    By token id, not by text: an answer that runs in circles says the very same tokens again, while ``Low prices. Low
    ratings`` at the start of two sentences and ``low`` within one are no circle.
    """

    name: ClassVar[str] = "repetition"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 11
    settings: RepetitionConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, or the price of each token ``(batch, response)`` if dense."""
        episodes = batch.episodes
        formula = repeated_ngrams if self.settings.dense else ngram_repetition
        return formula(episodes.ids, without_stop_token(episodes.sampled, episodes.ended), self.settings.n)

    @staticmethod
    def advice(settings: RepetitionConfig, reward: RewardConfig) -> Iterator[str]:
        """A penalty is negative, and should be there."""
        if settings.weight > 0:
            yield "repetition has a positive weight, which pays for repeating: a penalty has a negative one."
        if settings.weight == 0:
            yield "without a repetition penalty a policy can gain by repeating itself: watch response/repetition."


def without_stop_token(mask: Tensor, ended: Tensor) -> Tensor:
    """Unmask the last real token of every answer that ended by itself: its stop token. ``(batch, response)`` bool.

    A stop token occurs once, so n-grams with it never repeat and would dilute the share for answers that ended but not
    for answers that were cut. (An answer ended by a stop string loses its last token of the string instead.)
    """
    remaining = mask.flip(1).cumsum(dim=1).flip(1)  # 1 at the last real token
    return mask & ~((remaining == 1) & ended[:, None])


def repeated_ngrams(ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Price each token: a repeated n-gram costs ``1 / (number of n-grams)`` at its last token, ``(batch, response)``
    float32 >= 0.

    An n-gram is repeated where the same n >= 1 tokens occur earlier in the same answer, of those that ``mask`` marks; the
    prices of an answer sum to ``P = 1 - distinct n-grams / n-grams``. Answers shorter than n tokens cost nothing.
    """
    prices = torch.zeros(ids.shape, dtype=torch.float32)
    if ids.shape[1] < n:
        return prices.to(ids.device)
    grams = ids.cpu().unfold(1, n, 1)  # (batch, windows, n)
    valid = mask.cpu().unfold(1, n, 1).all(dim=2)
    row, start = valid.nonzero(as_tuple=True)
    if row.numel() == 0:
        return prices.to(ids.device)
    # The same n-gram in two answers is no repetition: the row is part of the key. Unique over all rows at once keeps
    # this O(tokens log tokens) in time and O(tokens) in memory.
    keys = torch.cat([row[:, None], grams[row, start]], dim=1)
    distinct, which = torch.unique(keys, dim=0, return_inverse=True)
    order = torch.arange(len(keys))
    first = torch.full((len(distinct),), len(keys)).scatter_reduce(0, which, order, reduce="amin")
    repeated = order != first[which]
    count = valid.sum(dim=1).float()
    prices[row, start + n - 1] = repeated.float() / count[row]
    return prices.to(ids.device)


def ngram_repetition(ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Repetition ``P = 1 - distinct n-grams / n-grams``, ``(batch,)`` float32 in [0, 1).

    Arguments as in :func:`repeated_ngrams`; answers shorter than n tokens give 0.
    """
    return repeated_ngrams(ids, mask, n).sum(dim=1)
