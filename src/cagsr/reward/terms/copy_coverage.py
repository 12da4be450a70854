"""Copy coverage: was each important word said by the very token that looks at it hardest?"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.models.texts import TokenTexts
from cagsr.reward.pooling import normalized_salience
from cagsr.reward.registry import LookingConfig, register
from cagsr.reward.same_text import same_text
from cagsr.reward.term import ATTENTION


@dataclass(frozen=True)
class CopyCoverageConfig(LookingConfig):
    """Copy coverage: a salient word counts when the response token that looks at it hardest says it."""


@register
@dataclass(frozen=True)
class CopyCoverage:
    """Copy coverage, :func:`copy_coverage`."""

    name: ClassVar[str] = "copy_coverage"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, "texts"})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 2
    settings: CopyCoverageConfig
    texts: TokenTexts

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        assert batch.attention is not None
        episodes = batch.episodes
        same = same_text(self.texts, episodes)
        return copy_coverage(batch.attention.words, episodes.salience, same, episodes.sampled, episodes.words)


def copy_coverage(word_attention: Tensor, salience: Tensor, same: Tensor, mask: Tensor, words: Tensor) -> Tensor:
    """Copy coverage: share of salience whose word is said by the token that looks at it hardest, ``(batch,)`` float32 in
    [0, 1].

    Word w counts when the token generated at ``argmax_t A[t, w]`` says what one of the word's pieces says; not one that no
    token looks at. An answer without tokens gets 0.

    ``word_attention`` is ``(batch, response, words)``, ``salience`` ``(batch, words)`` >= 0, normalised here, ``same``
    ``(batch, response, prompt)`` as of :func:`cagsr.reward.same_text.says`, ``mask`` marks real response tokens, ``words``
    ``(batch, prompt)`` int64 is the word of each prompt token, -1 for none.
    """
    num_words = word_attention.shape[2]
    if word_attention.shape[1] == 0 or num_words == 0:
        return torch.zeros(mask.shape[0], dtype=torch.float32, device=mask.device)
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0)
    strongest, position = looked.max(dim=1)  # (batch, words)
    index = words.clamp(min=0)
    hardest = position.gather(1, index)[:, None]  # (batch, 1, prompt): where the word of each prompt token is looked at
    hit = (same.gather(1, hardest)[:, 0] & (words >= 0)).float()
    copied = torch.zeros_like(strongest).scatter_reduce(1, index, hit, reduce="amax")
    return (copied * (strongest > 0) * normalized_salience(salience)).sum(dim=1)
