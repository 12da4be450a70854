"""Associated coverage: is each prompt word answered by a word that, in the model's own answers, goes with it?"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.association import Associations, by_text
from cagsr.reward.registry import TermConfig, register


@dataclass(frozen=True)
class AssociatedCoverageConfig(TermConfig):
    """Associated coverage: each prompt word must be answered by a word that, in the model's own answers, goes with it."""


@register
@dataclass(frozen=True)
class AssociatedCoverage:
    """Associated coverage, :meth:`cagsr.reward.association.Associations.coverage`."""

    name: ClassVar[str] = "associated_coverage"
    needs: ClassVar[frozenset[str]] = frozenset({"associations"})
    place: ClassVar[int] = 4
    settings: AssociatedCoverageConfig
    associations: Associations

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return by_text(self.associations.coverage, batch.episodes)
