"""Certainty: how sure is the model of each token? By three measures, over the whole answer or its end.

Self-certainty is how far the next-token distributions are from uniform (Intuitor, arXiv 2505.19590); minus their entropy, over the
last third of an answer (RENT, arXiv 2505.22660); the mean probability of the tokens that were said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveShare
from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class SelfCertaintyConfig(TermConfig):
    """Self-certainty (Intuitor): mean KL between the uniform and the policy's next-token distribution."""

    kind: Literal["self_certainty", "entropy", "mean_probability"] = "self_certainty"
    """entropy: minus the mean entropy of the distributions; mean_probability: of the tokens that were said."""
    last: PositiveShare = 1.0
    """Share of the answer that is looked at, its end: RENT looks at the last third of the tokens."""


@register
@dataclass(frozen=True)
class SelfCertainty:
    """Mean certainty of an answer's tokens, :func:`mean_certainty`."""

    name: ClassVar[str] = "self_certainty"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 13
    settings: SelfCertaintyConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, nats; of ``mean_probability`` in [0, 1]."""
        readings, mask = batch.readings, batch.episodes.sampled
        measure = {
            "self_certainty": lambda: readings.certainty,
            "entropy": lambda: -readings.entropy,
            "mean_probability": lambda: readings.logprobs.float().exp(),
        }[self.settings.kind]
        return mean_certainty(measure(), last_tokens(mask, self.settings.last))

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
    """Mean of ``(batch, response)`` certainties over the tokens of ``mask``, ``(batch,)`` float32; 0 for an answer of no token."""
    return torch.where(mask, certainty.float(), 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def last_tokens(mask: Tensor, share: float) -> Tensor:
    """The last ``share`` in (0, 1] of the tokens of ``mask`` ``(batch, response)`` bool, rounded up: one at least."""
    counts = mask.sum(dim=1, keepdim=True)
    kept = torch.ceil(counts * share - 1e-6)
    return mask & (mask.cumsum(dim=1) > counts - kept)
