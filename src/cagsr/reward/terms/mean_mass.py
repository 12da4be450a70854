"""Mean attention mass on salient words: the paper's literal reading, which pays for short answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.registry import LookingConfig, register
from cagsr.reward.term import ATTENTION

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class MeanMassConfig(LookingConfig):
    """Mean attention mass on salient words: the paper's literal reading, which pays for short answers."""


@register
@dataclass(frozen=True)
class MeanMass:
    """Mean attention mass on salient tokens, :func:`mean_mass`."""

    name: ClassVar[str] = "mean_mass"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 8
    settings: MeanMassConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        assert batch.attention is not None
        return mean_mass(batch.attention.maps, batch.episodes.words, batch.episodes.sampled)

    @staticmethod
    def advice(settings: MeanMassConfig, reward: RewardConfig) -> Iterator[str]:
        """It pays for short answers."""
        if settings.weight > 0:
            yield (
                "mean_mass pays for short answers (correlation with length -0.6 to -0.75 within a prompt) and hardly sees "
                "relevance: prefer coverage, or watch the length."
            )


def mean_mass(attention: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Mean attention mass on salient tokens, ``mean_t sum_{j in S} A[t, j]``: the literal reading of arXiv 2502.10482.

    It falls as an answer grows (docs/reward.md has the correlation with length), so it pays for short answers. Of attention
    ``(batch, response, prompt)``, the salient word of each prompt token (-1: none) and the mask of real response tokens it gives
    ``(batch,)`` float32 in [0, 1]; 0 for an answer without tokens.
    """
    mass = torch.where((words >= 0)[:, None, :], attention.float(), 0.0).sum(dim=2)
    return torch.where(mask, mass, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
