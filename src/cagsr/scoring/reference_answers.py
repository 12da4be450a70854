"""Reference answers among the sampled ones: the last of each prompt's answers is the row's own, which nobody sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Prompt, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.prompts.references import REFERENCE_COLUMNS, texts_of
from cagsr.rollout.episodes import Sample
from cagsr.rollout.rows import take_rows
from cagsr.scoring.answers import answered, encode_response


@dataclass(frozen=True)
class ReferencePlayer:
    """Samples all answers to a prompt but one, and gives the row's reference in its place (ViSurf, arXiv 2510.10606)."""

    loaded: LoadedModel
    generations: int
    """Answers to a prompt, the reference among them."""
    max_new_tokens: int
    """A longer reference is cut."""

    def __call__(self, sample: Sample, prompts: Sequence[EncodedPrompt], batch: PromptBatch) -> EpisodeBatch:
        """Sample with the engine ``sample``; a prompt's answers are behind each other, its reference the last one."""
        rows = torch.arange(len(prompts), device=batch.ids.device)
        given = rows % self.generations == self.generations - 1
        own = sample(take_rows(batch, rows[~given]))
        asked = [prompts[row] for row in rows[given].tolist()]
        references = [
            encode_response(self.loaded, one, reference_of(one.prompt), limit=self.max_new_tokens) for one in asked
        ]
        theirs = answered(self.loaded, asked, references)
        width = max(own.ids.shape[1], theirs.ids.shape[1])

        def merged(first: Tensor, second: Tensor, fill: int | float) -> Tensor:
            wide = [nn.functional.pad(one, (0, width - one.shape[1]), value=fill) for one in (first, second)]
            found = wide[0].new_zeros(len(prompts), width)
            found[~given], found[given] = wide[0], wide[1].to(found.dtype)
            return found

        mine, people = iter(own.completions), iter(theirs.completions)
        texts = tuple(next(people if one else mine) for one in given.tolist())
        ended = torch.zeros_like(given)
        ended[~given], ended[given] = own.ended, theirs.ended
        drawn = own.decoded_logprobs
        found = EpisodeBatch.of_one_turn(
            batch,
            merged(own.ids, theirs.ids, self.loaded.pad_token_id),
            merged(own.sampled, theirs.sampled, 0),
            ended,
            texts,
            None if drawn is None else merged(drawn, torch.zeros_like(theirs.ids, dtype=drawn.dtype), 0.0),
        )
        return replace(found, given=given)


def reference_of(prompt: Prompt) -> str:
    """The first reference of a row (``references``, ``reference`` or ``completion``); DataError where it has none."""
    for column in REFERENCE_COLUMNS:
        if texts := [text for text in texts_of(prompt.columns.get(column)) if text.strip()]:
            return texts[0]
    raise DataError(
        f"row {prompt.row}: it has no reference answer (column references, reference or completion), which --supervision.mode "
        "needs of every row; add one, or leave the row out."
    )
