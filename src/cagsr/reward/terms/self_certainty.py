"""Self-certainty: how far the next-token distributions are from uniform (Intuitor, arXiv 2505.19590)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class SelfCertaintyConfig(TermConfig):
    """Self-certainty (Intuitor): mean KL between the uniform and the policy's next-token distribution."""


@register
@dataclass(frozen=True)
class SelfCertainty:
    """Mean self-certainty of an answer's tokens, :func:`mean_certainty`."""

    name: ClassVar[str] = "self_certainty"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 11
    settings: SelfCertaintyConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, nats."""
        return mean_certainty(batch.readings.certainty, batch.episodes.sampled)

    @staticmethod
    def advice(settings: SelfCertaintyConfig, reward: RewardConfig) -> Iterator[str]:
        """Alone it collapses."""
        guards = ("self_certainty", "repetition", "unsupported", "echo")
        others = [weight for name, weight in reward.weights().items() if name not in guards]
        if settings.weight > 0 and not any([*others, *reward.functions, *reward.models]):
            yield (
                "self_certainty alone is known to gain early and then to shorten answers and collapse: add coverage, and "
                "watch length, entropy and the KL."
            )


def mean_certainty(certainty: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``(batch, response)`` certainties over real tokens, ``(batch,)`` float32; 0 for an answer of no token."""
    return torch.where(mask, certainty.float(), 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
