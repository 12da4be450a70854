"""A reward term of one's own: whether an answer looks hard at parts of the image that show nothing.

    cagsr train ... --reward.functions examples.images.empty.EmptyCoverage --reward.function_weights -0.5

Who invents a thing looks where it would be. A region shows nothing where all of it has the colour that most of the image has
(``salience.image_weights contrast`` gives it weight 0).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.term import ATTENTION
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.terms.image_coverage import weights_of


class EmptyCoverage:
    """Saturating coverage of the regions that show nothing; for prompts with images alone."""

    name: ClassVar[str] = "empty_coverage"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    threshold: ClassVar[float] = 0.3

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, 0 to 1."""
        return empty_coverage(batch, self.threshold)


def empty_coverage(batch: RewardBatch, threshold: float) -> Tensor:
    """:func:`cagsr.reward.terms.coverage.saturating_coverage` of the regions of weight 0, all alike; ``(batch,)``."""
    assert batch.attention is not None
    assert batch.attention.regions is not None
    # Regions that pad a row have no attention, so that they lower the values of all answers to its prompt alike.
    empty = (weights_of(batch) == 0).float()
    return saturating_coverage(batch.attention.regions, empty, batch.episodes.sampled, threshold)
