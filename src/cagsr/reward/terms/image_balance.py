"""The balance between image and text: an answer that never looks at the image covers none of it, whatever else it covers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from cagsr.config.ranges import PositiveShare
from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import ATTENTION, PartialValues
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.terms.image_coverage import no_image, weights_of


@dataclass(frozen=True)
class ImageBalanceConfig(TermConfig):
    """The smaller of the coverage of a prompt's words and that of its images' regions."""

    threshold: PositiveShare = 0.3
    """Attention at which a word or a region counts as covered (tau)."""


@register
@dataclass(frozen=True)
class ImageBalance:
    """``min(coverage of words, coverage of regions)``.

    The smaller of the two, and not the share of the attention that goes to the image: that is mostly a matter of how many places
    the image takes, and of models that look at images by cross-attention it is always 1.
    """

    name: ClassVar[str] = "image_balance"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True
    place: ClassVar[int] = 22
    shown: ClassVar[bool] = False
    settings: ImageBalanceConfig

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)``; it applies to prompts with an image."""
        episodes, attention, threshold = batch.episodes, batch.attention, self.settings.threshold
        assert attention is not None
        of_text = saturating_coverage(attention.words, episodes.salience, episodes.sampled, threshold)
        if attention.regions is None:
            return PartialValues(of_text, torch.zeros_like(of_text, dtype=torch.bool))
        weights = weights_of(batch)
        of_image = saturating_coverage(attention.regions, weights, episodes.sampled, threshold)
        with_images = torch.tensor([bool(one.images) for one in episodes.prompts.prompts], device=weights.device)
        return PartialValues(torch.minimum(of_image, of_text), with_images & (weights.sum(dim=1) > 0))

    @staticmethod
    def missing(settings: ImageBalanceConfig, prompts: Iterable[Prompt]) -> str | None:
        """An image."""
        return no_image(prompts)
