"""Target probability: how likely is the reference behind the answer's own reasoning?

In place of the result that an answer ends at stands the reference's, and the model says how likely it finds that (RLPR, arXiv
2506.18254; VeriFree, arXiv 2505.21493): a reward for what no rule can check. It is not label-free: rows need a reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.registry import TargetLikelihood, TermConfig, register
from cagsr.reward.term import PartialValues
from cagsr.tasks.final_answer import final_answer_span, result_of


@dataclass(frozen=True)
class TargetProbabilityConfig(TermConfig):
    """Target probability (not label-free): how likely the reference is in the place of the answer's own result (one pass more)."""

    column: str = "answer"
    """Column with the reference: the bare result, or a worked solution that ends at it."""
    reduce: Literal["mean", "product"] = "mean"
    """mean: of the tokens' probabilities, as RLPR does; product: of all of them, as VeriFree does."""


@register
@dataclass(frozen=True)
class TargetProbability:
    """Target probability, :func:`target_probability`; of single answers."""

    name: ClassVar[str] = "target_probability"
    needs: ClassVar[frozenset[str]] = frozenset({"target_likelihood"})
    place: ClassVar[int] = 18
    shown: ClassVar[bool] = False
    settings: TargetProbabilityConfig
    target_likelihood: TargetLikelihood

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)`` in [0, 1]; 0 for an answer that ends at nothing.

        It applies to rows that have the column, and where the model has room for it.
        """
        episodes = batch.episodes
        references = [prompt.columns.get(self.settings.column) for prompt in episodes.prompts.prompts]
        spans = [final_answer_span(text) for text in episodes.completions]
        single = episodes.context is None
        there = torch.tensor([single and one is not None for one in references], device=episodes.ids.device)
        rows = [row for row, known in enumerate(there.tolist()) if known and spans[row] is not None]
        values = torch.zeros(len(there), device=there.device)
        if rows:
            index = torch.tensor(rows, device=there.device)
            starts = [spans[row][0] for row in rows]  # type: ignore[index]
            logprobs, real = self.target_likelihood(
                episodes, index, starts, [result_of(references[row]) for row in rows]
            )
            values[index] = target_probability(logprobs, real, self.settings.reduce)
            there[index] &= real.any(dim=1)  # no room for the reference in the model's context
        return PartialValues(values, there)

    @staticmethod
    def missing(settings: TargetProbabilityConfig, prompts: Iterable[Prompt]) -> str | None:
        """The column."""
        there = any(one.columns.get(settings.column) is not None for one in prompts)
        return (
            None
            if there
            else f"a column {settings.column!r} with the right answer (--reward.target_probability.column)"
        )


def target_probability(logprobs: Tensor, real: Tensor, reduce: Literal["mean", "product"]) -> Tensor:
    """The mean or the product of the tokens' probabilities, ``(batch,)``; ``logprobs`` ``(batch, target)``, ``real`` bool."""
    if reduce == "product":
        return torch.where(real, logprobs.float(), 0.0).sum(dim=1).exp()
    return torch.where(real, logprobs.float().exp(), 0.0).sum(dim=1) / real.sum(dim=1).clamp(min=1)
