"""Length: how many tokens an answer has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from cagsr.config.ranges import NonNegativeInt
from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class LengthConfig(TermConfig):
    """Length of the answer in tokens, or its distance from a target."""

    weight: float = 0.0
    """Weight in the reward, negative pays for short answers; 0 leaves the term out."""
    target: NonNegativeInt | None = None
    """With a target the term is the distance in tokens from it (give a negative weight)."""


@register
@dataclass(frozen=True)
class Length:
    """Length in tokens, or the distance from a target, :func:`length`."""

    name: ClassVar[str] = "length"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 14
    settings: LengthConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, tokens."""
        return length(batch.episodes.sampled, self.settings.target)

    @staticmethod
    def advice(settings: LengthConfig, reward: RewardConfig) -> Iterator[str]:
        """A distance is to be small."""
        if settings.target is not None and settings.weight > 0:
            yield "length with a target and a positive weight pays for missing the target: give a negative weight."


def length(mask: Tensor, target: int | None = None) -> Tensor:
    """Count the real tokens of ``mask`` ``(batch, response)``, the stop token included, or take the distance from a target.

    ``(batch,)`` float32, tokens.
    """
    tokens = mask.sum(dim=1).float()
    return tokens if target is None else (tokens - target).abs()
