"""What an answer's likelihood is when some tokens of its prompt are hidden from the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.scoring.answer_logprobs import answer_logprobs


@dataclass(frozen=True)
class HiddenWords:
    """Reads answers to prompts that are masked in places, by the model as it is now; no gradients, nothing is changed."""

    loaded: LoadedModel
    temperature: float = 1.0

    def __call__(self, episodes: EpisodeBatch, hidden: Tensor, *, same: bool = False) -> Tensor:
        """Give ``(batch, response)`` float32 log-probabilities, 0 where nothing was sampled.

        ``hidden`` ``(batch, prompt)`` bool: tokens of the prompts that are left out, as if nobody had said them. Of
        single answers: episodes of one turn. ``same``: in all rows of a prompt, which is then read once for them. Of a prompt with
        images its salient words alone are left out: the images stay, and the marks around them.
        """
        seen = torch.tensor([one is not None for one in episodes.prompts.images or ()], device=hidden.device)
        if len(seen):
            hidden = hidden & ((episodes.prompts.words >= 0) | ~seen[:, None])

        def masked(part: EpisodeBatch, index: Tensor) -> EpisodeBatch:
            columns = episodes.prompts.real[index].any(dim=0).nonzero().flatten()
            own = hidden[index, int(columns[0]) : int(columns[-1]) + 1]
            return replace(part, prompts=self._without(part.prompts, own))

        return answer_logprobs(self.loaded, episodes, self.temperature, masked, share=same)

    def _without(self, prompts: PromptBatch, hidden: Tensor) -> PromptBatch:
        """Prompts without some of their tokens, padded as the model reads them: what comes last predicts the answer's first."""
        real = prompts.real & ~hidden
        on_the_left = self.loaded.architecture.padding_side == "left"
        order = (real if on_the_left else ~real).int().argsort(dim=1, stable=True)
        real = real.gather(1, order)
        ids = prompts.ids.gather(1, order).masked_fill(~real, self.loaded.pad_token_id)
        return replace(prompts, ids=ids, real=real)
