"""Coverage of a sound: was each stretch of time that matters listened to?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from cagsr.config.ranges import PositiveShare
from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import ATTENTION, PartialValues
from cagsr.reward.terms.image_coverage import coverage_of_regions


@dataclass(frozen=True)
class AudioCoverageConfig(TermConfig):
    """Coverage of the time of a prompt's sound: each stretch must be listened to hard once."""

    threshold: PositiveShare = 0.3
    """Attention at which a stretch counts as covered (tau)."""
    dense: bool = False
    """Pay each token for the coverage it adds (the gains sum to the coverage) instead of all at the end."""


@register
@dataclass(frozen=True)
class AudioCoverage:
    """:func:`cagsr.reward.terms.coverage.saturating_coverage` over the regions of a sound: covered time."""

    name: ClassVar[str] = "audio_coverage"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 23
    shown: ClassVar[bool] = False
    settings: AudioCoverageConfig

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)``, or the gains ``(batch, response)`` if dense; it applies to prompts with a sound."""
        assert batch.attention is not None
        with_sound = [bool(one.sounds) for one in batch.episodes.prompts.prompts]
        looked, settings = batch.attention.regions, self.settings
        return coverage_of_regions(batch, looked, with_sound, settings.threshold, dense=settings.dense)

    @staticmethod
    def missing(settings: AudioCoverageConfig, prompts: Iterable[Prompt]) -> str | None:
        """A sound."""
        return None if any(one.sounds for one in prompts) else "a sound (column 'audio')"
