"""What an answer's likelihood is when some tokens of its prompt are hidden from the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import gathered
from cagsr.rollout.rows import episode_rows
from cagsr.scoring.scorer import evaluating
from cagsr.scoring.statistics import logprobs_and

AT_ONCE = 16
"""Answers in a pass."""


@dataclass(frozen=True)
class HiddenWords:
    """Reads answers to prompts that are masked in places, by the model as it is now; no gradients, nothing is changed."""

    loaded: LoadedModel
    temperature: float = 1.0

    def __call__(self, episodes: EpisodeBatch, hidden: Tensor) -> Tensor:
        """Give ``(batch, response)`` float32 log-probabilities, 0 where nothing was sampled.

        ``hidden`` ``(batch, prompt)`` bool: tokens of the prompts that no position may look at, as if they were padding. Of
        single answers: episodes of one turn.
        """
        found = torch.zeros(episodes.ids.shape, dtype=torch.float32, device=episodes.ids.device)
        model = self.loaded.model
        with torch.no_grad(), gathered(model), evaluating(model), self.loaded.autocast():
            for index in torch.arange(len(found), device=found.device).split(AT_ONCE):
                part = episode_rows(episodes, index)
                columns = episodes.prompts.real[index].any(dim=0).nonzero().flatten()
                own = hidden[index, int(columns[0]) : int(columns[-1]) + 1]
                masked = replace(part, prompts=replace(part.prompts, real=part.prompts.real & ~own))
                statistics = logprobs_and(temperature=self.temperature)
                said = self.loaded.token_statistics(PassInputs.of(masked), statistics, part.sampled)[..., 0]
                found[index, : said.shape[1]] = torch.where(part.sampled, said.float(), 0.0)
        return found
