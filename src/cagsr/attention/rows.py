"""The attention of chosen rows to chosen columns, recomputed from queries and keys: pure functions over tensors.

``softmax(softcap(q kᵀ scaling) + position bias + mask)`` over all visible keys, of which the prompt columns are summed
over heads. It runs over blocks of heads, sequences and rows, so that what is held at once stays small whatever the
model; under gradients each block is recomputed in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cagsr.attention.masks import pick_rows
from cagsr.attention.plan import Piece

BLOCK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 25}
"""Scores held at once. On a CPU a block stays within the cache; on an accelerator few, large steps are faster."""


@dataclass(frozen=True)
class Softmax:
    """How one layer turns scores into probabilities."""

    scaling: float
    softcap: float | None = None
    """Scores are bent to ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118, section 2)."""
    position_bias: Tensor | None = None
    """``(batch | 1, heads, queries, keys)``, added to the scores (T5)."""
    sinks: Tensor | None = None
    """``(heads,)``: the logit of a key that does not exist but takes its share (gpt-oss)."""


@dataclass
class Scratch:
    """Memory that every block of a reading uses again: no allocation, no page faults after the first block."""

    held: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Give an uninitialised float32 tensor of this shape, valid until the name is taken again."""
        count = 1
        for size in shape:
            count *= size
        memory = self.held.get((name, device))
        if memory is None or memory.numel() < count:
            memory = self.held[name, device] = torch.empty(count, dtype=torch.float32, device=device)
        return memory[:count].view(shape)


@dataclass(frozen=True)
class _Block:
    batch: slice
    heads: slice  # among the chosen query heads, ordered by key-value head
    kv_heads: slice
    rows: slice


def add_prompt_attention(
    buffer: Tensor,
    query: Tensor,
    key: Tensor,
    piece: Piece,
    softmax: Softmax,
    heads: Sequence[int] | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Add the probabilities of one layer, summed over heads, to ``buffer`` in place; no gradients.

    Args:
        buffer: ``(n, response, prompt)`` float32.
        query: ``(batch, heads, queries, width)``, any float dtype; computed in float32.
        key: ``(batch, key-value heads, keys, width)``; each serves ``heads / key-value heads`` query heads.
        piece: which part of the forward, and where it goes.
        softmax: scaling and the like.
        heads: query heads that count, ascending; None: all.
        scratch: memory to use again from layer to layer.
    """
    scratch = Scratch() if scratch is None else scratch
    target = buffer[piece.target]
    with torch.no_grad():
        inputs = _Inputs.of(query, key, piece, softmax, heads)
        for block in _blocks(inputs, query.shape[1], key.shape[1], heads):
            part = _block_sum(*inputs.block(block), piece.columns, block.batch, softmax.softcap, scratch)
            target[block.batch, block.rows].add_(part)


def prompt_attention(
    shape: tuple[int, int, int],
    query: Tensor,
    key: Tensor,
    pieces: Sequence[Piece],
    softmax: Softmax,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Compute the same as a new tensor of ``shape``, with gradients to all that the scores depend on.

    Each block is checkpointed: the backward pass computes its probabilities again, so that none are kept.
    """
    result = torch.zeros(shape, dtype=torch.float32, device=query.device)
    for piece in pieces:
        inputs = _Inputs.of(query, key, piece, softmax, heads)
        sums: dict[tuple[int, int], tuple[_Block, Tensor]] = {}
        for block in _blocks(inputs, query.shape[1], key.shape[1], heads):
            arguments = (*inputs.block(block), piece.columns, block.batch, softmax.softcap, None)
            part = checkpoint(_block_sum, *arguments, use_reentrant=False, preserve_rng_state=False)
            place = block.batch.start, block.rows.start
            sums[place] = (block, part if place not in sums else sums[place][1] + part)
        for block, part in sums.values():
            result[piece.target][block.batch, block.rows] = part
    return result


@dataclass(frozen=True)
class _Inputs:
    query: Tensor  # (sequences, chosen heads, rows, width) float32, scaled
    key: Tensor  # (sequences, key-value heads, keys, width)
    mask: Tensor | None  # (sequences | 1, chosen heads | 1, rows, keys)
    position_bias: Tensor | None  # (sequences | 1, chosen heads | 1, rows | 1, keys)
    sinks: Tensor | None  # (chosen heads,)

    @staticmethod
    def of(query: Tensor, key: Tensor, piece: Piece, softmax: Softmax, heads: Sequence[int] | None) -> _Inputs:
        query, mask, bias, sinks = query[piece.sequences], piece.mask, softmax.position_bias, softmax.sinks
        if isinstance(piece.rows, slice):
            query = query[:, :, piece.rows]
        else:
            query = query.gather(2, piece.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        if bias is not None:
            bias = pick_rows(bias[..., : key.shape[2]], piece.sequences, piece.rows)[..., piece.keys]
        sinks = None if sinks is None else sinks.reshape(-1)
        if heads is not None:
            index = torch.as_tensor(heads, device=query.device)
            query = query[:, index]
            mask = mask[:, index] if mask is not None and mask.shape[1] > 1 else mask
            bias = bias[:, index] if bias is not None and bias.shape[1] > 1 else bias
            sinks = None if sinks is None else sinks[index]
        return _Inputs(query.float() * softmax.scaling, key[piece.sequences, :, piece.keys], mask, bias, sinks)

    def block(self, block: _Block) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return (
            self.query[block.batch, block.heads, block.rows],
            self.key[block.batch, block.kv_heads],
            _narrow(self.mask, block),
            _narrow(self.position_bias, block),
            None if self.sinks is None else self.sinks[block.heads],
        )


def _narrow(rows: Tensor | None, block: _Block) -> Tensor | None:
    """Cut out the block's part of a ``(sequences | 1, heads | 1, rows | 1, keys)`` tensor."""
    if rows is None:
        return None
    parts = zip(rows.shape[:3], (block.batch, block.heads, block.rows), strict=True)
    return rows[tuple(slice(None) if size == 1 else part for size, part in parts)]


def _blocks(inputs: _Inputs, all_heads: int, kv_heads: int, heads: Sequence[int] | None) -> Iterator[_Block]:
    """Blocks of about ``BLOCK_ELEMENTS`` scores: as many heads as fit, else fewer sequences, else fewer rows."""
    batch, _, rows, _ = inputs.query.shape
    keys, group = inputs.key.shape[2], all_heads // kv_heads
    budget = BLOCK_ELEMENTS.get(inputs.query.device.type, BLOCK_ELEMENTS["other"])
    row_step = _step(rows, budget // (group * keys))
    batch_step = _step(batch, budget // (group * keys * row_step))
    if heads is None:
        kv_step = _step(kv_heads, budget // (group * keys * row_step * batch_step))
        pairs = [
            (slice(first, min(first + kv_step, kv_heads)), slice(first * group, min(first + kv_step, kv_heads) * group))
            for first in range(0, kv_heads, kv_step)
        ]
    else:
        pairs, start = [], 0
        for kv_head in range(kv_heads):
            count = sum(head // group == kv_head for head in heads)
            if count:
                pairs.append((slice(kv_head, kv_head + 1), slice(start, start + count)))
            start += count
    for kv_part, head_part in pairs:
        for first in range(0, batch, batch_step):
            for row in range(0, rows, row_step):
                yield _Block(slice(first, first + batch_step), head_part, kv_part, slice(row, row + row_step))


def _step(count: int, most: int) -> int:
    """Find the size of the fewest equal steps of at most ``most`` (and at least 1)."""
    steps = -(-count // max(1, most))
    return -(-count // steps)


def _block_sum(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    columns: slice | Tensor,
    batch: slice,
    softcap: float | None,
    scratch: Scratch | None,
) -> Tensor:
    """``(sequences, rows, prompt)``: one block's probabilities at the prompt columns, summed over its heads."""
    n, heads, rows, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    flat_query = query.reshape(n * kv_heads, heads // kv_heads * rows, width)
    flat_key = (key[:, 0] if kv_heads == 1 else key.reshape(n * kv_heads, keys, width)).float().transpose(1, 2)
    shape = (flat_query.shape[0], flat_query.shape[1], keys)
    if scratch is None:
        scores = torch.bmm(flat_query, flat_key).view(n, heads, rows, keys)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if position_bias is None else scores + position_bias
        scores = scores if mask is None else scores + mask
    else:
        scores = torch.bmm(flat_query, flat_key, out=scratch.take("scores", shape, query.device))
        scores = scores.view(n, heads, rows, keys)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if position_bias is not None:
            scores.add_(position_bias)
        if mask is not None:
            scores.add_(mask)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(n, -1, rows, 1)
        probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    elif scratch is None:
        probabilities = torch.softmax(scores, dim=-1)
    else:
        memory = scratch.take("probabilities", (n, heads, rows, keys), query.device)
        probabilities = torch.softmax(scores, dim=-1, out=memory)
    if isinstance(columns, slice):
        chosen = probabilities[..., columns]
        return chosen[:, 0] if heads == 1 else chosen.sum(1)
    index = columns[batch][:, None, :]
    summed = probabilities.sum(1).gather(2, index.clamp(min=0).expand(-1, rows, -1))
    return summed.masked_fill(index < 0, 0.0)
