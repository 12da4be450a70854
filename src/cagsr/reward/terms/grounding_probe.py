"""Grounding probe: does the model itself know that a word of its answer has no ground in the prompt?

A linear probe on the hidden states of one layer, at the words that state something, tells a word that the prompt holds from
the same word of the same answer under a prompt from which it was swapped (``reward/learn_probe.py``). It is trained before the
first step on the starting model's own answers, without any label, reads the frozen starting model, which the policy can't move,
and costs a matrix-vector product in a pass that runs anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.registry import StatingTokens, TermConfig, register
from cagsr.reward.term import SUPPORT

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class GroundingProbeConfig(TermConfig):
    """Grounding probe: how far the model's hidden states deny that words of the answer stand in the prompt (reward.probe)."""

    dense: bool = False
    """Charge each word where it ends instead of all at the end."""


@register
@dataclass(frozen=True)
class GroundingProbe:
    """Grounding probe, :func:`denied`."""

    name: ClassVar[str] = "grounding_probe"
    needs: ClassVar[frozenset[str]] = frozenset({SUPPORT, "stating_tokens"})
    place: ClassVar[int] = 7
    settings: GroundingProbeConfig
    stating_tokens: StatingTokens

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, at most 0, logits a token; if dense ``(batch, response)``."""
        assert batch.readings.support is not None
        episodes = batch.episodes
        # No layer has a hidden state of what is fed to nothing: an answer's last token, which is a word's only where it was cut.
        last = episodes.sampled & (episodes.sampled.cumsum(dim=1) == episodes.lengths[:, None])
        words = self.stating_tokens(episodes).masked_fill(last, -1)
        found = denied(batch.readings.support, words, episodes.lengths)
        return found if self.settings.dense else found.sum(dim=1)

    @staticmethod
    def advice(settings: GroundingProbeConfig, reward: RewardConfig) -> Iterator[str]:
        """Alone it pays for saying nothing."""
        guards = ("grounding_probe", "lexical_support", "repetition", "unsupported", "echo")
        others = [weight for name, weight in reward.weights().items() if name not in guards and weight > 0]
        if settings.weight < 0:
            yield "grounding_probe has a negative weight, which pays for inventing: it is at most 0 already."
        if settings.weight > 0 and not any([*others, *reward.functions, *reward.models]):
            yield "grounding_probe alone pays for stating nothing: add a coverage."


def denied(support: Tensor, word: Tensor, lengths: Tensor) -> Tensor:
    """What each word that the probe denies costs, at its last token: ``(batch, response)`` float32, at most 0.

    ``sum_w min(0, mean_{t in w} logit_t) / tokens``: ``support`` ``(batch, response)`` are the probe's logits, ``word`` ``(batch,
    response)`` int64 says which stating word a token is a piece of, -1 for none, ``lengths`` ``(batch,)`` are the answers' tokens.
    Words that the probe affirms earn nothing, so that an answer gains by no word that it need not say.
    """
    count = int(word.max()) + 1 if word.numel() else 0
    there = word >= 0
    index = word.clamp(min=0)
    sums = support.new_zeros(len(word), max(count, 1), dtype=torch.float32)
    totals = sums.scatter_add(1, index, torch.where(there, support.float(), 0.0))
    pieces = sums.scatter_add(1, index, there.float())
    cost = (totals / pieces.clamp(min=1)).clamp(max=0.0) / lengths.clamp(min=1)[:, None]
    following = torch.nn.functional.pad(word[:, 1:], (0, 1), value=-1)
    return torch.where(there & (following != word), cost.gather(1, index), 0.0)
