"""Lexical support: of the words that state something in the answer, how many does its own prompt hold?

The plainest check against inventions: a value that another prompt of the set names, and this one does not, was made up or
confused. It needs no model. It sees nothing of what is said in other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from cagsr.config.ranges import Share
from cagsr.flow import RewardBatch
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stating_words import FLOOR, StatingWords
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import PartialValues

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class LexicalSupportConfig(TermConfig):
    """Lexical support: share of the answer's words that state something (a prompt of the set says them) which its prompt holds."""

    floor: Share = FLOOR
    """Words whose IDF over the prompts is below this share of the largest state nothing."""


@register
@dataclass(frozen=True)
class LexicalSupport:
    """Lexical support, :meth:`cagsr.prompts.stating_words.StatingWords.support`."""

    name: ClassVar[str] = "lexical_support"
    needs: ClassVar[frozenset[str]] = frozenset({"frequency"})
    place: ClassVar[int] = 6
    settings: LexicalSupportConfig
    frequency: DocumentFrequency

    @cached_property
    def stating(self) -> StatingWords:
        """The words that count."""
        return StatingWords(self.frequency, self.settings.floor)

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)`` in [0, 1]; it does not apply to answers that state nothing."""
        episodes = batch.episodes
        pairs = zip(episodes.prompts.prompts, episodes.completions, strict=True)
        found = [self.stating.support(prompt.text, text, prompt.template) for prompt, text in pairs]
        shares, counts = torch.tensor(found, dtype=torch.float32, device=episodes.ids.device).view(-1, 2).unbind(dim=1)
        return PartialValues(shares, counts > 0)

    @staticmethod
    def advice(settings: LexicalSupportConfig, reward: RewardConfig) -> Iterator[str]:
        """Alone it pays for saying little."""
        guards = ("lexical_support", "repetition", "unsupported", "echo")
        others = [weight for name, weight in reward.weights().items() if name not in guards and weight > 0]
        if settings.weight > 0 and not any([*others, *reward.functions, *reward.models]):
            yield "lexical_support alone pays for saying one word of the prompt: add a coverage."
