"""Which part of a forward's attention is read: the rows that predict response tokens, the columns of prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cagsr.errors import AttentionError


@dataclass(frozen=True, eq=False)
class AttentionRegion:
    """For each of ``n`` sequences: its row of the batch, its query positions and its key positions.

    The named constructors cover the usual layouts; they also mark rows or columns that are the same run of positions in
    every sequence, which are then read as slices, without copies. Whatever is read has the shape
    ``(n, response, prompt)`` and is zero where the row or the column is padding. Of a long prompt, ``only`` reads
    chosen tokens and ``pooled`` adds up those of each word, so that nothing as wide as the prompt is ever made.
    """

    batch: Tensor
    """``(n,)`` int64: the row of the forward's batch that holds the sequence."""
    rows: Tensor
    """``(n, response)`` int64: query position, within this forward, that predicts each response token; -1: padding."""
    columns: Tensor
    """``(n, prompt)`` int64: key position of each prompt token, counted from the first cached key; -1: padding."""
    row_slice: slice | None = None
    """The rows, where they are the same run in every sequence (padding included)."""
    column_slice: slice | None = None
    """The columns, where they are the same run in every sequence (padding included)."""
    keys: int | None = None
    """Decoding with a cache: keys seen so far, this forward's tokens included; a sliding cache holds only the last."""
    words: Tensor | None = None
    """``(n, prompt)`` int64: the word that each column is added to, -1 for none; None: columns are read one by one."""
    num_words: int = 0

    def __post_init__(self) -> None:
        n = self.batch.shape[0]
        if self.batch.dim() != 1 or self.rows.dim() != 2 or self.columns.dim() != 2:
            raise AttentionError(
                f"An attention region needs batch (n,), rows (n, response) and columns (n, prompt), not "
                f"{tuple(self.batch.shape)}, {tuple(self.rows.shape)} and {tuple(self.columns.shape)}."
            )
        if self.rows.shape[0] != n or self.columns.shape[0] != n:
            raise AttentionError(
                f"An attention region needs as many rows and columns as sequences ({n}), not "
                f"{self.rows.shape[0]} and {self.columns.shape[0]}."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, response, prompt)``, or ``(n, response, words)`` if pooled: the shape of what is read."""
        width = self.columns.shape[1] if self.words is None else self.num_words
        return self.rows.shape[0], self.rows.shape[1], width

    def valid(self, device: torch.device) -> Tensor:
        """Of the shape of what is read, bool: True where neither the row nor the column is padding."""
        rows = (self.rows.to(device) >= 0)[:, :, None]
        return rows.expand(self.shape) if self.words is not None else rows & self._real_columns(device)

    def clear_padding(self, read: Tensor) -> Tensor:
        """Set what was read, of this region's shape, to 0 where the row or the column is padding, in place."""
        read.masked_fill_((self.rows.to(read.device) < 0)[:, :, None], 0.0)
        return read if self.words is not None else read.masked_fill_(~self._real_columns(read.device), 0.0)

    def _real_columns(self, device: torch.device) -> Tensor:
        return (self.columns.to(device) >= 0)[:, None, :]

    def only(self, chosen: Tensor) -> AttentionRegion:
        """Read some of the columns alone: what is read is ``(n, response, chosen)``.

        All built-in terms of the reward look at the tokens of salient words only: for them, this loses nothing. ``chosen`` is
        ``(n, chosen)`` int64, indices into this region's columns, -1 for padding (see ``chosen_columns``); AttentionError where its
        shape does not fit, an index is out of range, or the region is pooled already.
        """
        n, prompt = self.columns.shape
        if self.words is not None:
            raise AttentionError("A pooled region can't be narrowed: choose the columns first, then pool them.")
        if chosen.dim() != 2 or chosen.shape[0] != n or (chosen.numel() > 0 and int(chosen.max()) >= prompt):
            raise AttentionError(
                f"The chosen columns need the shape ({n}, chosen) and indices below {prompt}; these have the shape "
                f"{tuple(chosen.shape)}."
            )
        columns = self.columns.gather(1, chosen.clamp(min=0).to(self.columns.device))
        return replace(self, columns=columns.masked_fill(chosen.to(columns.device) < 0, -1), column_slice=None)

    def pooled(self, words: Tensor, num_words: int) -> AttentionRegion:
        """Add up the columns of each word while reading: what is read is ``(n, response, words)``.

        The same as ``cagsr.reward.pooling.pool_pieces`` with ``how="sum"`` of what would be read without, but columns of
        no word are never computed, and what is as wide as the prompt never stored. ``words`` is ``(n, prompt)`` int64, the word of
        each column of this region, -1 for none; AttentionError as ``only``, or where a word is not below ``num_words``.
        """
        if words.shape != self.columns.shape or (words.numel() > 0 and int(words.max()) >= num_words):
            raise AttentionError(
                f"The words of a region need the shape {tuple(self.columns.shape)} and indices below {num_words}; these "
                f"have the shape {tuple(words.shape)}."
            )
        index = chosen_columns((words >= 0) & (self.columns.to(words.device) >= 0))
        narrow = self.only(index)
        kept = words.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        return replace(narrow, words=kept, num_words=num_words)

    @classmethod
    def _of_masks(
        cls, prompt: Tensor, response: Tensor, first: int = 0, looked_at: Tensor | None = None, keys: int | None = None
    ) -> AttentionRegion:
        """Each sequence in its own row, responses predicted from query position ``first`` on; the last token is never fed."""
        fed = prompt if looked_at is None else torch.cat([prompt, looked_at[:, :-1].to(prompt.device).bool()], dim=1)
        return cls(
            batch=torch.arange(prompt.shape[0], device=prompt.device),
            rows=(_positions(response) + first).masked_fill(~response, -1),
            columns=_positions(fed),
            row_slice=slice(first, first + response.shape[1]),
            column_slice=slice(0, fed.shape[1]),
            keys=keys,
        )

    @classmethod
    def left_padded(
        cls, prompt_mask: Tensor, response_mask: Tensor, looked_at: Tensor | None = None
    ) -> AttentionRegion:
        """One forward over prompts padded on the left followed by responses padded on the right.

        ``prompt_mask`` ``(batch, prompt)`` is true for real tokens, ``response_mask`` ``(batch, response)`` for the tokens
        whose predicting positions are read. ``looked_at`` ``(batch, response)`` marks response tokens that later ones are
        read to look at, as columns behind the prompt's (all but the last token, which is not fed); None: the prompt's
        columns alone. AttentionError: prompts not padded on the left, or other batch sizes.
        """
        prompt, response = _masks(prompt_mask, response_mask)
        if not bool(prompt[:, -1].all()):
            row = int((~prompt[:, -1]).nonzero()[0])
            raise AttentionError(
                f"The prompt of sequence {row} does not end at the last prompt position: pad prompts on the left, or "
                f"use AttentionRegion.right_padded."
            )
        return cls._of_masks(prompt, response, prompt.shape[1] - 1, looked_at)

    @classmethod
    def right_padded(cls, prompt_lengths: Tensor, response_lengths: Tensor) -> AttentionRegion:
        """One forward over sequences prompt + response without a gap, padded on the right; lengths in tokens, ``(batch,)``,
        prompts >= 1.
        """
        prompt, response = _lengths(prompt_lengths, response_lengths)
        batch = torch.arange(len(prompt), device=prompt.device)
        columns = _runs(torch.zeros_like(prompt), prompt)
        return cls(batch, _runs(prompt - 1, response), columns, column_slice=slice(0, columns.shape[1]))

    @classmethod
    def packed(cls, prompt_lengths: Tensor, response_lengths: Tensor, batch: Tensor | None = None) -> AttentionRegion:
        """Several sequences prompt + response one after the other in a row of the batch, position ids restarting.

        Lengths as in ``right_padded``, in the order in which they are packed. ``batch`` is ``(n,)`` the batch row of each
        sequence, not decreasing; None: all in row 0.
        """
        prompt, response = _lengths(prompt_lengths, response_lengths)
        batch = torch.zeros_like(prompt) if batch is None else batch.to(prompt.device, torch.int64)
        lengths = prompt + response
        # Sequences count from the start of their own batch row, not of the whole pack.
        row_start = torch.stack([lengths[batch < row].sum() for row in batch])
        starts = lengths.cumsum(0) - lengths - row_start
        return cls(batch, _runs(starts + prompt - 1, response), _runs(starts, prompt))

    @classmethod
    def after_prefix(
        cls, prompt_mask: Tensor, response_mask: Tensor, looked_at: Tensor | None = None
    ) -> AttentionRegion:
        """Make the region of a forward over responses alone, their prompts' keys and values in the cache.

        The forward is fed ``response[:-1]``; the row of its first token predicts the second. The first response token is
        predicted by the forward over the prompts: read that one with ``left_padded(prompts, torch.ones(prompts, 1))``.

        ``response_mask`` is ``(batch, response - 1)``, true where the token that is predicted is read; the rest as there.
        """
        prompt, response = _masks(prompt_mask, response_mask)
        return cls._of_masks(prompt, response, 0, looked_at, prompt.shape[1] + response.shape[1])

    @classmethod
    def encoder_decoder(cls, prompt_mask: Tensor, response_mask: Tensor, prefix: int = 1) -> AttentionRegion:
        """Put the prompt in the encoder; the decoder reads [start, y0, y1, ...]: row t predicts token t.

        Masks ``(batch, prompt)`` and ``(batch, response)`` are true for real tokens, prompts padded on either side. One
        response column serves a decoding step too. ``prefix`` tokens are read before y0: the start token, and forced ones.
        """
        return cls._of_masks(*_masks(prompt_mask, response_mask), prefix - 1)

    def looking_at(self, places: Tensor, regions: int) -> AttentionRegion:
        """The same rows looking, by cross-attention, at image states, which are added up by region.

        ``places`` ``(n, states)`` int64 is the region of each state, -1 for none; ``regions`` is how many there are.
        """
        columns = torch.arange(places.shape[1], device=places.device).expand_as(places)
        across = AttentionRegion(self.batch, self.rows, columns, self.row_slice)
        return across.pooled(places, regions)

    @classmethod
    def decoding(cls, prompt_mask: Tensor, fed: int, alive: Tensor | None = None) -> AttentionRegion:
        """One step of a decoder-only model with a key-value cache: one token in, the next one predicted.

        The first response token is predicted by the forward over the prompt itself: read that one with
        ``left_padded(prompt_mask, torch.ones(batch, 1))``. ``prompt_mask`` is as there; ``fed`` counts response tokens read
        so far, this step's included; ``alive`` ``(batch,)`` is false for sequences that have ended (None: all go on).
        """
        if fed < 1:
            raise AttentionError(f"A decoding step has read at least one response token, not {fed}.")
        prompt = prompt_mask.bool()
        alive = prompt.new_ones(prompt.shape[0]) if alive is None else alive.to(prompt.device).bool()
        return cls._of_masks(prompt, alive[:, None], keys=prompt.shape[1] + fed)


def chosen_columns(chosen: Tensor) -> Tensor:
    """Number the true columns of ``(n, prompt)``: ``(n, most)`` int64, ascending, padded with -1 on the right."""
    counts = chosen.sum(1)
    # A stable sort brings the true columns to the front in their order.
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)[:, : int(counts.max()) if len(counts) else 0]
    return order.masked_fill(torch.arange(order.shape[1], device=order.device) >= counts[:, None], -1)


def _masks(prompt_mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    if prompt_mask.dim() != 2 or response_mask.dim() != 2 or prompt_mask.shape[0] != response_mask.shape[0]:
        raise AttentionError(
            f"The prompt mask and the response mask need the shapes (batch, prompt) and (batch, response), not "
            f"{tuple(prompt_mask.shape)} and {tuple(response_mask.shape)}."
        )
    if prompt_mask.shape[1] == 0:
        raise AttentionError("The prompt mask has no columns: every prompt needs at least one token.")
    return prompt_mask.bool(), response_mask.to(prompt_mask.device).bool()


def _lengths(prompt_lengths: Tensor, response_lengths: Tensor) -> tuple[Tensor, Tensor]:
    prompt, response = prompt_lengths.to(torch.int64), response_lengths.to(prompt_lengths.device, torch.int64)
    if prompt.dim() != 1 or prompt.shape != response.shape or len(prompt) == 0:
        raise AttentionError(
            f"Prompt lengths and response lengths need one number a sequence, not the shapes {tuple(prompt.shape)} and "
            f"{tuple(response.shape)}."
        )
    if bool((prompt < 1).any()):
        raise AttentionError(f"The prompt of sequence {int((prompt < 1).nonzero()[0])} has no tokens.")
    return prompt, response


def _positions(mask: Tensor) -> Tensor:
    """Each column's own number where the mask is true, -1 elsewhere."""
    return torch.arange(mask.shape[1], device=mask.device).expand_as(mask).masked_fill(~mask, -1)


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """``(n, longest)``: start, start + 1, ... for each length, then -1."""
    steps = torch.arange(int(lengths.max()), device=starts.device)
    return (starts[:, None] + steps).masked_fill(steps >= lengths[:, None], -1)
