"""Faithfulness of the attention: does the answer depend on the words it looked at more than on those it did not?

Attention that is not used says nothing of an answer. So the words that the answer looked at hardest are hidden, and as many of
those that it looked at least; where hiding the first costs the answer more of its likelihood, the attention told the truth. It
takes two more passes over the answers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveShare
from cagsr.flow import RewardBatch
from cagsr.reward.registry import HiddenLikelihood, TermConfig, register
from cagsr.reward.term import ATTENTION, PartialValues


@dataclass(frozen=True)
class FaithfulnessConfig(TermConfig):
    """Faithfulness: what hiding the words that were looked at hardest costs, less what hiding those looked at least does."""

    share: PositiveShare = 0.25
    """Share of the salient words that is hidden, at least one word, at most half of them."""


@register
@dataclass(frozen=True)
class Faithfulness:
    """Faithfulness, :func:`most_and_least`; of single answers whose prompts have two salient words or more."""

    name: ClassVar[str] = "faithfulness"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, "hidden_likelihood"})
    place: ClassVar[int] = 20
    settings: FaithfulnessConfig
    hidden_likelihood: HiddenLikelihood

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)``, nats a token."""
        assert batch.attention is not None
        episodes = batch.episodes
        if episodes.context is not None:
            nothing = torch.zeros(len(episodes.ids), device=episodes.ids.device)
            return PartialValues(nothing, nothing.bool())
        most, least = most_and_least(batch.attention.words, episodes.salience, episodes.sampled, self.settings.share)
        without_most, without_least = (
            self.hidden_likelihood(episodes, tokens_of(words, episodes.words)).sum(dim=1) for words in (most, least)
        )
        lengths = episodes.lengths.clamp(min=1)
        return PartialValues((without_least - without_most) / lengths, most.any(dim=1))


def most_and_least(word_attention: Tensor, salience: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The words that an answer looked at hardest and least, ``(batch, words)`` bool each, as many of both, none in common.

    How hard is the largest attention of a token. Of n words with ``salience`` ``(batch, words)`` > 0 it is ``max(1, share n)``,
    at most half of them; none of a single word. ``word_attention`` ``(batch, response, words)``, ``mask`` ``(batch, response)``
    bool marks the answer's tokens.
    """
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0).amax(dim=1)
    salient = salience > 0
    count = salient.sum(dim=1)
    taken = torch.minimum((count * share).floor().clamp(min=1), count // 2)
    # Words that weigh nothing come last in both orders.
    place = torch.arange(salience.shape[1], device=salience.device)

    def first(order: Tensor) -> Tensor:
        rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
        return (rank < taken[:, None]) & salient

    hardest = looked.masked_fill(~salient, -1.0).argsort(dim=1, descending=True, stable=True)
    # Of equals the same would be hidden both times: the second order goes through them from the end.
    least = (looked.masked_fill(~salient, float("inf")).flip(1).argsort(dim=1, stable=True) - (len(place) - 1)).abs()
    return first(hardest), first(least)


def tokens_of(words: Tensor, word_of_token: Tensor) -> Tensor:
    """The tokens of some words, ``(batch, prompt)`` bool: ``words`` ``(batch, words)`` bool, ``word_of_token`` -1 for none."""
    if words.shape[1] == 0:  # prompts that are an image or a sound, and nothing else
        return torch.zeros_like(word_of_token, dtype=torch.bool)
    return words.gather(1, word_of_token.clamp(min=0)) & (word_of_token >= 0)
