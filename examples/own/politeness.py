"""A reward term with a setting: answers are to say a certain word.

    cagsr train ... --reward.functions examples.own.politeness.Politeness --reward.function_settings Politeness.word=please

With ``@register`` (cagsr.reward.registry) over it and an entry point ``cagsr.reward_terms``, it has flags of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig


@dataclass(frozen=True)
class PolitenessConfig(TermConfig):
    """Politeness: whether the answer says a certain word."""

    word: str = "please"
    """The word that is to be said."""


@dataclass(frozen=True)
class Politeness:
    """1 for an answer that says the word, else 0."""

    name: ClassVar[str] = "politeness"
    needs: ClassVar[frozenset[str]] = frozenset()  # nothing but the answers: for this term alone no attention is read
    settings: PolitenessConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        said = [float(self.settings.word in text.lower().split()) for text in batch.episodes.completions]
        return torch.tensor(said, device=batch.episodes.ids.device)
