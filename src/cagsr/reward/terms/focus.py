"""Focus: does each response token look at few of the important words?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cagsr.config.ranges import ShareBelowOne
from cagsr.flow import RewardBatch
from cagsr.reward.registry import LookingConfig, register
from cagsr.reward.term import ATTENTION

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class FocusConfig(LookingConfig):
    """Focus: one minus the normalised entropy of the attention over salient words."""

    weight: float = 0.0
    """Weight in the reward; negative pays for spread attention; 0 leaves the term out."""
    entropy_floor: ShareBelowOne = 0.0
    """The normalised entropy is clamped from below to this, so that collapse onto one word does not pay."""


@register
@dataclass(frozen=True)
class Focus:
    """Focus, :func:`focus`."""

    name: ClassVar[str] = "focus"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 9
    settings: FocusConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        assert batch.attention is not None
        episodes = batch.episodes
        return focus(batch.attention.words, episodes.salience, episodes.sampled, self.settings.entropy_floor)

    @staticmethod
    def advice(settings: FocusConfig, reward: RewardConfig) -> Iterator[str]:
        """Without a floor it pays for collapse."""
        if settings.weight > 0 and settings.entropy_floor == 0:
            yield (
                "focus without an entropy_floor pays for attention that collapses onto one word: set "
                "reward.focus.entropy_floor (0.1 to 0.3)."
            )


def focus(word_attention: Tensor, salience: Tensor, mask: Tensor, entropy_floor: float = 0.0) -> Tensor:
    """Focus ``F = mean_t (1 - max(floor, H(A[t, S] renormalised) / log |S|))``, ``(batch,)`` float32 in [0, 1 - floor].

    S are the words with ``salience`` ``(batch, words)`` > 0, which weighs nothing here. The normalised entropy is 0 where a
    token looks at one word only and 1 where it looks at all alike; clamping it from below, to ``entropy_floor`` in [0, 1),
    keeps attention from being paid for collapse (arXiv 2506.11108). A token that looks at no word of S has entropy 1, as it
    prefers none. With a single word there is nothing to choose, and the focus is 0, as it is of an answer without tokens.

    ``word_attention`` is ``(batch, response, words)``, ``mask`` ``(batch, response)`` bool marks real tokens.
    """
    salient = salience > 0
    looked = torch.where(salient[:, None, :], word_attention.float(), 0.0)
    mass = looked.sum(dim=2, keepdim=True)
    share = looked / torch.where(mass > 0, mass, 1.0)
    entropy = torch.special.entr(share).sum(dim=2)  # (batch, response), nats
    size = salient.sum(dim=1)
    spread = size.clamp(min=2).float().log()[:, None]
    normalized = torch.where(mass.squeeze(2) > 0, entropy / spread, 1.0).clamp(min=entropy_floor, max=1.0)
    counted = mask & (size > 1)[:, None]
    return torch.where(counted, 1.0 - normalized, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
