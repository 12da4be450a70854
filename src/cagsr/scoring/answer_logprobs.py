"""The log-probabilities of answers that are read anew, by the model as it is now; no gradients, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import gathered
from cagsr.models.sharing import shares_prompts
from cagsr.rollout.rows import episode_rows
from cagsr.scoring.micro_batches import micro_batches
from cagsr.scoring.scorer import evaluating
from cagsr.scoring.statistics import logprobs_and

AT_ONCE = 16
"""Answers in a pass."""


def answer_logprobs(
    loaded: LoadedModel,
    episodes: EpisodeBatch,
    temperature: float,
    changed: Callable[[EpisodeBatch, Tensor], EpisodeBatch] = lambda part, _: part,
    *,
    share: bool = False,
) -> Tensor:
    """Give ``(batch, response)`` float32, 0 where nothing was sampled.

    ``changed`` makes of some rows, whose numbers ``(n,)`` int64 it is handed too, what is read in their place. ``share``: a prompt
    is read once for its answers, if the model can.
    """
    found = torch.zeros(episodes.ids.shape, dtype=torch.float32, device=episodes.ids.device)
    model, statistics = loaded.model, logprobs_and(temperature=temperature)
    with torch.no_grad(), gathered(model), evaluating(model), loaded.autocast():
        share = share and shares_prompts(loaded, episodes)
        for index in micro_batches(episodes, AT_ONCE, share=share):
            part = changed(episode_rows(episodes, index), index)
            said = loaded.token_statistics(PassInputs.of(part, share=share), statistics, part.sampled)[..., 0]
            found[index, : said.shape[1]] = torch.where(part.sampled, said.float(), 0.0)
    return found
