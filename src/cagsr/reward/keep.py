"""What a scoring pass keeps of the prompt attention: all of it, or only what the reward makes of each micro-batch.

A map is as wide as the prompt: kept for a whole batch of long prompts, and pooled and compared there, it can outweigh
the model. The built-in terms look at one answer at a time, so they are worked out where the attention is read, and the
map is dropped with its micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cagsr.flow import PromptAttention, RewardBatch, Rollout, Scores
from cagsr.reward.terms import AttentionTerm
from cagsr.reward.words import pool_words


class AttentionKeeper:
    """Takes in the attention of micro-batches and gives what is kept of them all.

    Args:
        rollout: the whole batch.
        terms: what is worked out of each micro-batch; None: its maps are kept instead.
        pooling: how the pieces of a word are put together.
    """

    def __init__(
        self, rollout: Rollout, terms: Sequence[AttentionTerm] | None, pooling: Literal["sum", "max"] = "sum"
    ) -> None:
        self._terms, self._pooling = terms, pooling
        self._prompts = rollout.prompts.mask
        self._shape = rollout.response_ids.shape
        self._device = rollout.response_ids.device
        batch, response = self._shape
        self._maps = None
        if terms is None:
            self._maps = torch.zeros(batch, response, self._prompts.shape[1], device=self._device)
        self._values: dict[str, Tensor] = {}

    def add(self, index: Tensor, part: Rollout, attention: Tensor) -> None:
        """Take in a micro-batch.

        Args:
            index: which sequences of the batch it holds, ``(n,)`` int64.
            part: those sequences, cut to their own length (``rollout_rows``).
            attention: ``(n, response, prompt)`` float32, as wide as ``part``.
        """
        response = attention.shape[1]
        if self._maps is not None:
            # The columns that were cut, on whichever side, are padding in all of these rows.
            first = int(self._prompts[index].any(dim=0).nonzero()[0])
            self._maps[index, :response, first : first + attention.shape[2]] = attention
            return
        assert self._terms is not None
        words = pool_words(attention, part.prompts.words, part.prompts.salience.shape[1], self._pooling)
        for term in self._terms:
            value = term.read(part, attention, words)
            dense = value.dim() == 2
            kept = self._values.setdefault(
                term.name, torch.zeros(self._shape if dense else self._shape[:1], device=self._device)
            )
            if dense:
                kept[index, :response] = value
            else:
                kept[index] = value

    @property
    def kept(self) -> PromptAttention:
        """The maps ``(batch, response, prompt)``, or the terms' values."""
        return PromptAttention(self._maps, self._values)


def reward_batch(
    rollout: Rollout,
    scores: Scores,
    reference_logprobs: Tensor | None,
    attention: PromptAttention | None,
    pooling: Literal["sum", "max"] = "sum",
) -> RewardBatch:
    """Put together what the reward's terms look at; maps, where they were kept, are pooled to words here.

    Args:
        rollout: prompts and answers.
        scores: of the policy.
        reference_logprobs: ``(batch, response)`` under the frozen starting model.
        attention: what was kept of the policy's attention, or of the reference's; None: none was read.
        pooling: how the pieces of a word are put together.
    """
    if attention is None:
        return RewardBatch(rollout, scores, reference_logprobs, None, None)
    if attention.maps is None:
        return RewardBatch(rollout, scores, reference_logprobs, None, None, attention.values)
    prompts = rollout.prompts
    words = pool_words(attention.maps, prompts.words, prompts.salience.shape[1], pooling)
    return RewardBatch(rollout, scores, reference_logprobs, attention.maps, words)
