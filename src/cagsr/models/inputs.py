"""What a teacher-forced pass is fed: prompts and what follows them, and which rows have the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch, ImageInputs

WORTH = 1.5
"""Answers to a prompt, on average, from which on its prefix is read apart: two forwards cost more than one."""


@dataclass(frozen=True)
class SharedPrompts:
    """Which rows of a batch answer the same prompt."""

    first: Tensor  # (prompts,) int64: a row with each prompt
    of_row: Tensor  # (batch,) int64: each row's prompt

    @classmethod
    def of(cls, group: Tensor) -> SharedPrompts | None:
        """Rows of the same number, ``(batch,)`` int64, have one prompt; None where reading it apart does not pay."""
        prompts, of_row = torch.unique(group, return_inverse=True)
        if len(group) < WORTH * len(prompts):
            return None
        rows = torch.arange(len(group), device=group.device)
        first = torch.full_like(prompts, len(group)).scatter_reduce(0, of_row, rows, "amin")
        return cls(first, of_row)


@dataclass(frozen=True)
class PassInputs:
    """A batch of prompts and what followed them, as the model's forward takes them."""

    prompt_ids: Tensor  # (batch, prompt)
    prompt_real: Tensor  # (batch, prompt)
    response_ids: Tensor  # (batch, response)
    response_real: Tensor  # (batch, response)
    shared: SharedPrompts | None = None  # where each prompt is read once for its answers
    lengths: Tensor | None = None  # (batch,) tokens by which a row's rotary frequencies go; None: they do not change
    sampled: Tensor | None = None  # (batch, response) whose attention is read; None: of all that is real
    looked_at: Tensor | None = None  # (batch, response) whose columns are read, besides the prompt's; None: of none
    images: tuple[ImageInputs | None, ...] | None = None  # of each row; None: no prompt has images

    @classmethod
    def of(cls, episodes: EpisodeBatch, *, share: bool = False) -> PassInputs:
        """Take the tensors of episodes.

        ``share``: read a prompt once for all of its answers, where that pays; only for models that
        :func:`~cagsr.models.sharing.shares_prompts` says yes of.
        """
        prompts = episodes.prompts
        shared = SharedPrompts.of(prompts.group) if share else None
        sampled = looked_at = None
        if episodes.context is not None:
            sampled, looked_at = episodes.sampled, episodes.context.words[:, prompts.ids.shape[1] :] >= 0
        return cls(
            prompts.ids,
            prompts.real,
            episodes.ids,
            episodes.real,
            shared,
            sampled=sampled,
            looked_at=looked_at,
            images=prompts.images if any(prompts.images or ()) else None,
        )

    @classmethod
    def tiny(cls, device: torch.device) -> PassInputs:
        """Make the smallest batch any model takes."""
        ids = torch.ones(1, 2, dtype=torch.long, device=device)
        return cls(ids, ids.bool(), ids, ids.bool())

    @property
    def rows_read(self) -> Tensor:
        """``(batch, response)`` bool: the tokens whose predicting positions' attention is read."""
        return self.response_real if self.sampled is None else self.sampled
