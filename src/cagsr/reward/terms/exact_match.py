"""Exact match: does the answer end at the right result? The verifiable reward, as one more term; it needs a reference."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import PartialValues
from cagsr.reward.turns import is_last
from cagsr.tasks.final_answer import is_right


@dataclass(frozen=True)
class ExactMatchConfig(TermConfig):
    """Exact match (not label-free): 1 where an answer ends at what the row's reference ends at, else 0."""

    column: str = "answer"
    """Column with the reference: the bare result, or a worked solution that ends at it."""


@register
@dataclass(frozen=True)
class ExactMatch:
    """Exact match, :func:`cagsr.tasks.final_answer.is_right`; of steps and conversations the last answer's alone."""

    name: ClassVar[str] = "exact_match"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 17
    shown: ClassVar[bool] = False
    by_episode: ClassVar[bool] = True
    settings: ExactMatchConfig

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)``; it applies to last answers of rows that have the column."""
        episodes = batch.episodes
        references = [prompt.columns.get(self.settings.column) for prompt in episodes.prompts.prompts]
        last = is_last(episodes)
        values = [
            float(reference is not None and is_right(text, reference))
            for text, reference in zip(episodes.completions, references, strict=True)
        ]
        there = torch.tensor([reference is not None for reference in references], device=last.device)
        return PartialValues(torch.tensor(values, device=last.device), there & last)

    @staticmethod
    def missing(settings: ExactMatchConfig, prompts: Iterable[Prompt]) -> str | None:
        """The column."""
        there = any(one.columns.get(settings.column) is not None for one in prompts)
        return None if there else f"a column {settings.column!r} with the right answer (--reward.exact_match.column)"
