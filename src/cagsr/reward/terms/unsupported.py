"""Unsupported: how much of the answer goes with nothing that its prompt says (invented facts)?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.association import Associations, by_text
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class UnsupportedConfig(TermConfig):
    """Unsupported: share of the answer's words that go with prompt words which this prompt lacks (invented facts)."""

    weight: float = 0.0
    """Weight in the reward, negative for a penalty; 0 leaves the term out."""


@register
@dataclass(frozen=True)
class Unsupported:
    """Unsupported words, :meth:`cagsr.reward.association.Associations.unsupported`."""

    name: ClassVar[str] = "unsupported"
    needs: ClassVar[frozenset[str]] = frozenset({"associations"})
    place: ClassVar[int] = 5
    settings: UnsupportedConfig
    associations: Associations

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return by_text(self.associations.unsupported, batch.episodes)

    @staticmethod
    def advice(settings: UnsupportedConfig, reward: RewardConfig) -> Iterator[str]:
        """A penalty is negative, and alone it pays for silence."""
        if settings.weight > 0:
            yield "unsupported has a positive weight, which pays for inventing: a penalty has a negative one."
        if settings.weight < 0 and reward.associated_coverage.weight <= 0:
            yield (
                "unsupported without associated_coverage pays for saying less: give reward.associated_coverage.weight a "
                "value."
            )
