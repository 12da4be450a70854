"""Coverage: was each important word of the prompt looked at?

Notation of docs/reward.md: ``A[t, w]`` is the attention from the position that predicts response token t to
prompt word w, ``s_w`` the salience of the word divided by the prompt's sum.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveShare
from cagsr.flow import RewardBatch
from cagsr.reward.pooling import normalized_salience
from cagsr.reward.registry import CoveringConfig, register
from cagsr.reward.term import ATTENTION
from cagsr.reward.turns import said_so_far


@dataclass(frozen=True)
class CoverageConfig(CoveringConfig):
    """Saturating coverage: each salient word must be looked at hard once."""

    threshold: PositiveShare = 0.3
    """Attention at which a word counts as covered (tau)."""


@register
@dataclass(frozen=True)
class Coverage:
    """Saturating coverage, :func:`saturating_coverage`."""

    name: ClassVar[str] = "coverage"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 1
    settings: CoverageConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, or the gains ``(batch, response)`` if dense."""
        assert batch.attention is not None
        episodes, looked = batch.episodes, batch.attention.words
        said = said_so_far(episodes) if self.settings.new else episodes.sampled
        if not self.settings.new and not self.settings.dense:
            return saturating_coverage(looked, episodes.salience, said, self.settings.threshold)
        gains = coverage_gains(looked, episodes.salience, said, self.settings.threshold)
        gains = gains.masked_fill(~episodes.sampled, 0.0)
        return gains if self.settings.dense else gains.sum(dim=1)


def coverage_gains(word_attention: Tensor, salience: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """How much each response token adds to the saturating coverage, ``(batch, response)`` float32 in [0, 1], 0 on masked
    tokens.

    ``C_t = sum_w s_w min(1, max_{u <= t} A[u, w] / tau)`` only grows with t; the gain of token t is ``C_t - C_{t-1}``, so
    that the gains of an answer sum to its coverage.

    ``word_attention`` is ``(batch, response, words)``, ``salience`` ``(batch, words)`` >= 0, normalised here, ``mask``
    ``(batch, response)`` bool marks real tokens, ``threshold`` is tau > 0.
    """
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0)
    if looked.shape[1] == 0:
        return looked.new_zeros(mask.shape)
    covered = (looked.cummax(dim=1).values / threshold).clamp(max=1.0)
    before = torch.nn.functional.pad(covered[:, :-1], (0, 0, 1, 0))
    return ((covered - before) * normalized_salience(salience)[:, None, :]).sum(dim=2)


def saturating_coverage(word_attention: Tensor, salience: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Saturating coverage ``C = sum_w s_w min(1, max_t A[t, w] / tau)``, ``(batch,)`` float32 in [0, 1].

    Arguments as in :func:`coverage_gains`. An answer without tokens, and a prompt without a salient word, give 0.
    """
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0)
    if looked.shape[1] == 0:
        return looked.new_zeros(mask.shape[0])
    covered = (looked.amax(dim=1) / threshold).clamp(max=1.0)
    return (covered * normalized_salience(salience)).sum(dim=1)
