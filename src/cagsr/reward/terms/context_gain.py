"""Context gain: how much likelier does the prompt make the answer?

``log p(y | prompt) - log p(y | no prompt)``, the pointwise mutual information of prompt and answer under the model itself (SAR,
arXiv 2509.05489; CTRL-RAG, arXiv 2603.04406): an answer that would be said to any prompt gains nothing. Without its prompt is: with
every token of it hidden but the first (the attention sink) and the template's. It takes one pass more, in which a prompt is read
once for all its answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.registry import HiddenLikelihood, StatingTokens, TermConfig, register
from cagsr.reward.term import PartialValues

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class ContextGainConfig(TermConfig):
    """Context gain: how much likelier the prompt makes the answer (one pass more)."""

    over: Literal["all", "stating"] = "all"
    """all: every token of the answer; stating: those of words that a prompt of the set says and not every prompt does."""
    reduce: Literal["sum", "mean"] = "sum"
    """sum: nats an answer, which grows as it says more; mean: nats a token, which pays for short answers."""
    dense: bool = False
    """Pay each token its own gain instead of all at the end."""


@register
@dataclass(frozen=True)
class ContextGain:
    """Context gain, :func:`context_gain`; of single answers."""

    name: ClassVar[str] = "context_gain"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_likelihood", "stating_tokens"})
    place: ClassVar[int] = 15
    settings: ContextGainConfig
    hidden_likelihood: HiddenLikelihood
    stating_tokens: StatingTokens

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)`` nats, or ``(batch, response)`` if dense."""
        episodes = batch.episodes
        if episodes.context is not None:
            nothing = torch.zeros(len(episodes.ids), device=episodes.ids.device)
            return PartialValues(nothing, nothing.bool())
        without = self.hidden_likelihood(episodes, prompt_tokens(episodes.prompts.real, episodes.words), same=True)
        counted = episodes.sampled
        if self.settings.over == "stating":
            counted = self.stating_tokens(episodes) >= 0
        gains = context_gain(batch.readings.logprobs, without, counted, self.settings.reduce)
        return PartialValues(gains if self.settings.dense else gains.sum(dim=1), torch.ones_like(counted[:, 0]))

    @staticmethod
    def advice(settings: ContextGainConfig, reward: RewardConfig) -> Iterator[str]:
        """The sum grows with length, the mean falls with it."""
        if settings.weight > 0 and settings.reduce == "sum" and reward.length.weight == 0:
            yield "context_gain grows with every token that the prompt makes likelier: hold the length by reward.length."
        if settings.weight > 0 and settings.reduce == "mean":
            yield "context_gain a token pays for short answers: give the sum, or hold the length by reward.length."


def context_gain(given: Tensor, without: Tensor, counted: Tensor, reduce: Literal["sum", "mean"]) -> Tensor:
    """What each token gains, ``(batch, response)`` nats, 0 where nothing is ``counted`` (bool); the mean's tokens sum to it.

    ``given`` and ``without`` ``(batch, response)`` are the log-probabilities with the prompt and without.
    """
    gains = torch.where(counted, given.float() - without.float(), 0.0)
    return gains / counted.sum(dim=1, keepdim=True).clamp(min=1) if reduce == "mean" else gains


def prompt_tokens(real: Tensor, words: Tensor) -> Tensor:
    r"""The tokens to hide, ``(batch, prompt)`` bool: all from the first salient word to the last, but never the first token.

    What stands around them (a template, ``\nDescription:``) is the same in every prompt and stays. ``real`` and ``words``
    ``(batch, prompt)``: no padding; the salient word of each token, -1 for none.
    """
    salient = (words >= 0).int()
    between = (salient.cummax(dim=1).values.bool()) & (salient.flip(1).cummax(dim=1).values.flip(1).bool())
    first = real & (real.int().cumsum(dim=1) == 1)
    return between & real & ~first
