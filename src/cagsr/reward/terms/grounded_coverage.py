"""Grounded coverage: was each important word looked at by the very token that says it?

Plain coverage pays for looking at a word, whatever is said meanwhile: an answer that looks at a name and misspells it is
paid in full. Here only attention from a response token to a prompt token of the same text counts, so that the answer's
text vouches for what its attention claims. It sees what is copied, not what is paraphrased.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveShare
from cagsr.flow import RewardBatch
from cagsr.models.texts import TokenTexts
from cagsr.reward.pooling import normalized_salience
from cagsr.reward.registry import CoveringConfig, register
from cagsr.reward.same_text import says
from cagsr.reward.term import ATTENTION
from cagsr.reward.turns import said_so_far


@dataclass(frozen=True)
class GroundedCoverageConfig(CoveringConfig):
    """Grounded coverage: each salient token must be looked at hard once by the response token that says it."""

    weight: float = 1.0
    """Weight in the reward; 0 leaves the term out."""
    threshold: PositiveShare = 0.1
    """Attention at which a token counts as covered (tau)."""


@register
@dataclass(frozen=True)
class GroundedCoverage:
    """Grounded coverage, :func:`grounded_coverage`."""

    name: ClassVar[str] = "grounded_coverage"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, "texts"})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 3
    settings: GroundedCoverageConfig
    texts: TokenTexts

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, or the gains ``(batch, response)`` if dense."""
        assert batch.attention is not None
        episodes = batch.episodes
        said = said_so_far(episodes) if self.settings.new else episodes.sampled
        same = says(self.texts, episodes.ids, said, episodes.context_ids, episodes.words)
        rest = (batch.attention.maps, same, episodes.words, episodes.salience, self.settings.threshold)
        if not self.settings.new and not self.settings.dense:
            return grounded_coverage(*rest)
        gains = grounded_coverage_gains(*rest).masked_fill(~episodes.sampled, 0.0)
        return gains if self.settings.dense else gains.sum(dim=1)


def grounded_coverage_gains(
    attention: Tensor, same: Tensor, words: Tensor, salience: Tensor, threshold: float
) -> Tensor:
    """How much each response token adds to the grounded coverage, ``(batch, response)`` float32 in [0, 1], 0 on masked
    tokens.

    ``G_t = sum_w s_w mean_{j in w} min(1, max_{u <= t} A[u, j] [y_u says x_j] / tau)``: saturating coverage in which token
    u counts for prompt token j only if it says the same; the pieces of a word count alike. It grows with t only, so the
    gains ``G_t - G_{t-1}`` sum to the coverage.

    ``attention`` and ``same`` (:func:`cagsr.reward.same_text.says`) are ``(batch, response, prompt)``, ``words`` ``(batch,
    prompt)`` int64 is the salient word of each prompt token, -1 for none, ``salience`` ``(batch, words)`` >= 0, normalised
    here, ``threshold`` tau > 0.
    """
    if attention.shape[1] == 0 or salience.shape[1] == 0:
        return torch.zeros(attention.shape[:2], dtype=torch.float32, device=attention.device)
    grounded = torch.where(same, attention.float(), 0.0)
    covered = (grounded.cummax(dim=1).values / threshold).clamp(max=1.0)
    before = torch.nn.functional.pad(covered[:, :-1], (0, 0, 1, 0))
    return torch.einsum("btp,bp->bt", covered - before, _token_weights(words, salience))


def grounded_coverage(attention: Tensor, same: Tensor, words: Tensor, salience: Tensor, threshold: float) -> Tensor:
    """Grounded coverage ``G = sum_w s_w mean_{j in w} min(1, max_t A[t, j] [y_t says x_j] / tau)``, ``(batch,)`` in [0, 1].

    Arguments as in :func:`grounded_coverage_gains`. An answer without tokens, and a prompt without a salient word, give 0.
    """
    if attention.shape[1] == 0 or salience.shape[1] == 0:
        return torch.zeros(attention.shape[0], dtype=torch.float32, device=attention.device)
    grounded = torch.where(same, attention.float(), 0.0)
    covered = (grounded.amax(dim=1) / threshold).clamp(max=1.0)
    return (covered * _token_weights(words, salience)).sum(dim=1)


def _token_weights(words: Tensor, salience: Tensor) -> Tensor:
    """Share each word's normalised salience among its pieces, ``(batch, prompt)``."""
    salient = (words >= 0).float()
    index = words.clamp(min=0)
    pieces = torch.zeros_like(salience, dtype=torch.float32).scatter_add_(1, index, salient)
    per_piece = normalized_salience(salience) / pieces.clamp(min=1)
    return per_piece.gather(1, index) * salient
