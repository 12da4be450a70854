"""Coverage of images: was each region that matters looked at?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveShare
from cagsr.flow import Prompt, RewardBatch
from cagsr.models.image_arguments import region_weights
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import ATTENTION, PartialValues
from cagsr.reward.terms.coverage import coverage_gains, saturating_coverage


@dataclass(frozen=True)
class ImageCoverageConfig(TermConfig):
    """Coverage of the regions of a prompt's images: each must be looked at hard once."""

    threshold: PositiveShare = 0.3
    """Attention at which a region counts as covered (tau)."""
    dense: bool = False
    """Pay each token for the coverage it adds (the gains sum to the coverage) instead of all at the end."""


@register
@dataclass(frozen=True)
class ImageCoverage:
    """:func:`cagsr.reward.terms.coverage.saturating_coverage` over the regions of images."""

    name: ClassVar[str] = "image_coverage"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 21
    shown: ClassVar[bool] = False
    settings: ImageCoverageConfig

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)``, or the gains ``(batch, response)`` if dense; it applies to prompts with an image."""
        assert batch.attention is not None
        with_images = [bool(one.images) for one in batch.episodes.prompts.prompts]
        looked, settings = batch.attention.regions, self.settings
        return coverage_of_regions(batch, looked, with_images, settings.threshold, dense=settings.dense)

    @staticmethod
    def missing(settings: ImageCoverageConfig, prompts: Iterable[Prompt]) -> str | None:
        """An image."""
        return no_image(prompts)


def no_image(prompts: Iterable[Prompt]) -> str | None:
    """What a term about images misses; None: there is one."""
    return None if any(one.images for one in prompts) else "an image (column 'images')"


def coverage_of_regions(
    batch: RewardBatch, looked: Tensor | None, applies: Sequence[bool], threshold: float, *, dense: bool
) -> PartialValues:
    """``(batch,)`` the coverage of each prompt's regions, or the gains ``(batch, response)`` if dense, where it ``applies``.

    ``looked`` is the attention to regions, ``(batch, response, regions)``; None: no prompt has any.
    """
    sampled = batch.episodes.sampled
    if looked is None:
        return PartialValues(sampled.new_zeros(sampled.shape[:1], dtype=torch.float32), sampled.new_zeros(len(sampled)))
    weights = weights_of(batch)
    measure = coverage_gains if dense else saturating_coverage
    has_some = torch.tensor(applies, device=weights.device) & (weights.sum(dim=1) > 0)
    return PartialValues(measure(looked, weights, sampled, threshold), has_some)


def weights_of(batch: RewardBatch) -> Tensor:
    """``(batch, regions)`` what each region of a batch with images or sounds weighs; 0 where a prompt has none."""
    images = batch.episodes.prompts.images
    assert images is not None
    return region_weights(images)
