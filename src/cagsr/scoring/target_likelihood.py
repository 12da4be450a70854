"""How likely other words are to the model in the place where an answer ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch
from cagsr.models.continuation import encode_continuation
from cagsr.models.load import LoadedModel
from cagsr.rollout.rows import take_rows
from cagsr.scoring.answer_logprobs import answer_logprobs


@dataclass(frozen=True)
class TargetLikelihoodOf:
    """Reads targets behind the beginnings of answers, by the model as it is now; no gradients, nothing is changed."""

    loaded: LoadedModel
    temperature: float = 1.0

    def __call__(
        self, episodes: EpisodeBatch, rows: Tensor, starts: Sequence[int], targets: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(rows, target)`` float32 of the texts' tokens, and which there are, bool.

        ``rows`` ``(n,)`` int64 of ``episodes`` of one turn; of each answer the ``starts`` first characters stay (the tokens that
        end there: one that reaches beyond is left out), and behind them stands the text of ``targets``; a row for which the
        model has no room has no token.
        """
        asked = take_rows(episodes, rows)
        beginnings = [
            self._until(ids[real].tolist(), start)
            for ids, real, start in zip(asked.ids, asked.sampled, starts, strict=True)
        ]
        texts = tuple(self.loaded.text_of(ids) for ids in beginnings)
        endings = []
        for prompt, before, said, start, target in zip(
            asked.prompts.prompts, texts, asked.completions, starts, targets, strict=True
        ):
            stands_behind = self.loaded.architecture.text_before(prompt.text) + before
            # Its last token may have held the space, or the sign, that stands before the target.
            text = said[len(before) : start] + target
            endings.append(encode_continuation(self.loaded.tokenizer, stands_behind, text))
        context = self.loaded.pair_context()
        if context is not None:
            prompts = asked.prompts.real.sum(dim=1).tolist()
            fits = [
                p + len(one) + len(other) <= context for p, one, other in zip(prompts, beginnings, endings, strict=True)
            ]
            endings = [ending if fit else [] for ending, fit in zip(endings, fits, strict=True)]
        width = max(1, *(len(one) + len(other) for one, other in zip(beginnings, endings, strict=True)))
        ids = torch.full((len(rows), width), self.loaded.pad_token_id, dtype=torch.int64)
        wanted = torch.zeros(len(rows), width, dtype=torch.bool)
        real = torch.zeros_like(wanted)
        for row, (first, second) in enumerate(zip(beginnings, endings, strict=True)):
            ids[row, : len(first) + len(second)] = torch.tensor([*first, *second], dtype=torch.int64)
            real[row, : len(first) + len(second)] = True
            wanted[row, len(first) : len(first) + len(second)] = True
        device = episodes.ids.device
        ended = torch.ones(len(rows), dtype=torch.bool, device=device)
        made = EpisodeBatch.of_one_turn(asked.prompts, ids.to(device), real.to(device), ended, texts)
        made = replace(made, sampled=wanted.to(device))
        longest = max(1, *(len(one) for one in endings))
        found = torch.zeros(len(rows), longest, device=device)
        there = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for row, said in enumerate(answer_logprobs(self.loaded, made, self.temperature)):
            own = said[made.sampled[row]]
            found[row, : len(own)], there[row, : len(own)] = own, True
        return found, there

    def _until(self, ids: list[int], start: int) -> list[int]:
        """The first tokens of an answer that say no more than its first ``start`` characters."""
        count = bisect_left(range(len(ids) + 1), True, key=lambda many: len(self.loaded.text_of(ids[:many])) > start)
        return ids[: max(0, count - 1)]
