"""The ceiling of SciTLDR: ROUGE-L to the summary that people wrote, as reward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from cagsr.errors import DataError
from cagsr.evaluation.metrics import rouge_l
from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig
from examples.e2e.prepare import read_jsonl


@dataclass(frozen=True)
class RougeToReferenceConfig(TermConfig):
    """ROUGE-L to the reference: what reinforcement learning gains when the reward knows the answer."""

    file: str = "runs/scitldr/labelled.jsonl"
    """Prompts with their references."""


@dataclass
class RougeToReference:
    """ROUGE-L of each answer to its prompt's references, the best of them."""

    name: ClassVar[str] = "rouge_to_reference"
    needs: ClassVar[frozenset[str]] = frozenset()
    settings: RougeToReferenceConfig

    @cached_property
    def _references(self) -> dict[str, list[str]]:
        return {row["prompt"]: row["references"] for row in read_jsonl(Path(self.settings.file))}

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``. Raises DataError for a prompt without references."""
        found = []
        episodes = batch.episodes
        for prompt, text in zip(episodes.prompts.prompts, episodes.completions, strict=True):
            if prompt.text not in self._references:
                raise DataError(f"{self.settings.file}: has no references for the prompt {prompt.text[:60]!r}.")
            found.append(rouge_l(text, self._references[prompt.text]))
        return torch.tensor(found, device=episodes.ids.device)
