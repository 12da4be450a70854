"""The attention of chosen rows to chosen columns, recomputed from queries and keys.

``softmax(softcap(q kᵀ scaling) + position bias + mask)`` over all visible keys, of which the prompt columns are summed
over heads. It runs over blocks of sequences, rows, columns and heads, masks included, so that what is held at once
stays small whatever the model and the prompt; under gradients each block is recomputed in the backward pass instead of
being kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cagsr.attention.intercept import Intercepted
from cagsr.attention.masks import mask_rows, pick_rows
from cagsr.attention.plan import Piece
from cagsr.attention.probabilities import Scratch, Softmax, exponential_columns, softmax_columns

BLOCK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 25}
"""Scores held at once. On a CPU a block stays within the cache; on an accelerator few, large steps are faster."""
_NARROWEST = 256
"""Columns that a block has at least where it can: narrower products are slow."""


def add_prompt_attention(
    buffer: Tensor, call: Intercepted, piece: Piece, softmax: Softmax, heads: Sequence[int] | None = None
) -> None:
    """Add one layer's probabilities, summed over ``heads`` (ascending; None: all), to ``buffer`` in place; no gradients.

    ``buffer`` is ``(n, response, prompt)`` float32, or ``(n, response, words)``. Queries and keys of any float dtype are
    computed in float32; with the call's log-sum-exp only the columns of the piece are computed.
    """
    target, scratch = buffer[piece.target], Scratch()
    with torch.no_grad():
        inputs = _Inputs.of(call, piece, softmax, heads)
        if inputs.fused():
            inputs.add_fused(target)
            return
        for place in inputs.places():
            mask = inputs.mask(place)
            for part in inputs.head_parts(place):
                query, key, bias = inputs.block(place, part)
                narrow = _heads_of(mask, part.heads)
                if inputs.logsumexp is not None:
                    known = inputs.logsumexp[place.batch, part.heads, place.rows]
                    found = exponential_columns(query, key, narrow, bias, known, scratch)
                    found = found if inputs.missing is None else _without(found, inputs.missing[place.cut])
                else:
                    sinks = None if inputs.sinks is None else inputs.sinks[part.heads]
                    columns = _cut(piece.columns, place.batch)
                    found = softmax_columns(query, key, narrow, bias, sinks, columns, softmax.softcap, scratch)
                if piece.words is None:
                    target[place.batch, place.rows, place.columns].add_(found)
                else:
                    target[place.batch, place.rows].scatter_add_(2, *_to_words(found, piece.words[place.cut]))


def prompt_attention(
    shape: tuple[int, int, int],
    call: Intercepted,
    pieces: Sequence[Piece],
    softmax: Softmax,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Compute the same as a new tensor of ``shape``, with gradients to all that the scores depend on.

    Each block is checkpointed: the backward pass computes its mask and its probabilities again, so that none are kept.
    """
    result = torch.zeros(shape, dtype=torch.float32, device=call.query.device)
    for piece in pieces:
        inputs = _Inputs.of(call, piece, softmax, heads, with_gradients=True)
        rows: dict[int, list[Tensor]] = {}
        for place in inputs.places():
            total = sum(_checkpointed(inputs, place, part) for part in inputs.head_parts(place))
            assert isinstance(total, Tensor)
            if piece.words is not None:
                index, found = _to_words(total, piece.words[place.cut])
                total = found.new_zeros(*found.shape[:2], shape[2]).scatter_add(2, index, found)
            rows.setdefault(place.batch.start, []).append(total)
        result[piece.target] = torch.cat([torch.cat(parts, dim=1) for parts in rows.values()])
    return result


@dataclass(frozen=True)
class _Place:
    """Where a block lies within its piece."""

    batch: slice
    rows: slice
    columns: slice  # all of them, unless the log-sum-exp is known

    @property
    def cut(self) -> tuple[slice, slice]:
        """The block's part of a ``(sequences, columns)`` tensor."""
        return self.batch, self.columns


@dataclass(frozen=True)
class _Heads:
    heads: slice  # among the chosen query heads, ordered by key-value head
    kv_heads: slice


@dataclass(frozen=True)
class _Inputs:
    call: Intercepted
    piece: Piece
    softmax: Softmax
    heads: Sequence[int] | None
    query: Tensor  # (sequences, chosen heads, rows, width)
    key: Tensor  # (sequences, key-value heads, keys, width); with the log-sum-exp the columns alone
    position_bias: Tensor | None  # (sequences | 1, chosen heads | 1, rows | 1, keys or columns)
    sinks: Tensor | None  # (chosen heads,)
    logsumexp: Tensor | None  # (sequences, chosen heads, rows)
    missing: Tensor | None  # (sequences, columns) bool: not among the keys; None: none is

    @staticmethod
    def of(
        call: Intercepted, piece: Piece, softmax: Softmax, heads: Sequence[int] | None, with_gradients: bool = False
    ) -> _Inputs:
        query, bias, sinks = call.query[piece.sequences], softmax.position_bias, softmax.sinks
        # The backward pass needs all keys; and a kernel that bends scores or has sinks is none whose sum is known.
        known = not with_gradients and softmax.softcap is None and sinks is None
        logsumexp = call.logsumexp[piece.sequences] if known and call.logsumexp is not None else None
        if isinstance(piece.rows, slice):
            query = query[:, :, piece.rows]
            logsumexp = None if logsumexp is None else logsumexp[:, :, piece.rows]
        else:
            index = piece.rows[:, None, :].expand(-1, query.shape[1], -1)
            query = query.gather(2, index[..., None].expand(-1, -1, -1, query.shape[3]))
            logsumexp = None if logsumexp is None else logsumexp.gather(2, index)
        if bias is not None:
            bias = pick_rows(bias[..., : call.key.shape[2]], piece.sequences, piece.rows)[..., piece.keys]
        sinks = None if sinks is None else sinks.reshape(-1)
        if heads is not None:
            chosen = torch.as_tensor(heads, device=query.device)
            query = query[:, chosen]
            bias = bias[:, chosen] if bias is not None and bias.shape[1] > 1 else bias
            sinks = None if sinks is None else sinks[chosen]
            logsumexp = None if logsumexp is None else logsumexp[:, chosen]
        key, missing = call.key[piece.sequences, :, piece.keys], None
        if logsumexp is not None:
            key = _columns_of(key, piece.columns, 2)
            bias = None if bias is None else _columns_of(bias, piece.columns, 3)
            missing = piece.columns < 0 if isinstance(piece.columns, Tensor) else None
        return _Inputs(call, piece, softmax, heads, query, key, bias, sinks, logsumexp, missing)

    def places(self) -> Iterator[_Place]:
        """Blocks of about ``BLOCK_ELEMENTS`` scores of one key-value head: as many sequences as fit, rows, columns."""
        batch, _, rows, _ = self.query.shape
        columns = self.key.shape[2]
        budget = self._budget // (self.call.query.shape[1] // self.call.key.shape[1])
        column_step, wide = columns, columns
        if self.logsumexp is not None:
            column_step = _step(columns, max(_NARROWEST, budget // rows))
            # Masks of columns here and there are cut out of the mask of all keys.
            gathered = isinstance(self.piece.columns, Tensor) and not self.piece.open
            wide = max(column_step, self.call.key.shape[2]) if gathered else column_step
        row_step = _step(rows, budget // wide)
        batch_step = _step(batch, budget // (wide * row_step))
        for first in range(0, batch, batch_step):
            for row in range(0, rows, row_step):
                for column in range(0, columns, column_step):
                    yield _Place(
                        slice(first, min(first + batch_step, batch)),
                        slice(row, min(row + row_step, rows)),
                        slice(column, min(column + column_step, columns))
                        if self.logsumexp is not None
                        else slice(None),
                    )

    def head_parts(self, place: _Place) -> Iterator[_Heads]:
        """Key-value heads with their query heads, as many as fit at this place."""
        kv_heads = self.call.key.shape[1]
        group = self.call.query.shape[1] // kv_heads
        if self.heads is not None:
            start = 0
            for kv_head in range(kv_heads):
                count = sum(head // group == kv_head for head in self.heads)
                if count:
                    yield _Heads(slice(start, start + count), slice(kv_head, kv_head + 1))
                start += count
            return
        block = self.query[place.batch, 0, place.rows, 0].numel() * self.key[0, 0, place.columns].shape[0]
        step = _step(kv_heads, self._budget // (group * block))
        for first in range(0, kv_heads, step):
            last = min(first + step, kv_heads)
            yield _Heads(slice(first * group, last * group), slice(first, last))

    def mask(self, place: _Place) -> Tensor | None:
        """``(sequences | 1, heads | 1, rows, keys or columns)`` float32, to be added; None: everything is seen."""
        piece = self.piece
        if self.logsumexp is not None and piece.open:
            return None
        first = piece.sequences.start
        sequences = slice(first + place.batch.start, first + place.batch.stop)
        if isinstance(piece.rows, slice):
            rows: slice | Tensor = slice(piece.rows.start + place.rows.start, piece.rows.start + place.rows.stop)
        else:
            rows = piece.rows[place.batch, place.rows]
        keys = piece.keys
        if self.logsumexp is not None and isinstance(piece.columns, slice):
            start = keys.start + piece.columns.start
            keys = slice(start + place.columns.start, start + place.columns.stop)
        mask = mask_rows(self.call, piece.causal, sequences, rows, keys)
        if mask is not None and self.heads is not None and mask.shape[1] > 1:
            mask = mask[:, torch.as_tensor(self.heads, device=mask.device)]
        if mask is not None and self.logsumexp is not None and isinstance(piece.columns, Tensor):
            mask = _columns_of(mask, piece.columns[place.cut], 3)
        return mask

    def block(self, place: _Place, part: _Heads) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, keys and position bias of a block."""
        bias = self.position_bias
        if bias is not None:
            sizes = zip(bias.shape[:3], (place.batch, part.heads, place.rows), strict=True)
            bias = bias[tuple(slice(None) if size == 1 else cut for size, cut in sizes)][..., place.columns]
        query = self.query[place.batch, part.heads, place.rows].float() * self.softmax.scaling
        return query, self.key[place.batch, part.kv_heads, place.columns], bias

    def fused(self) -> bool:
        """Whether the kernel for CUDA takes this: columns that are all seen, of known log-sum-exp, without a bias."""
        plain = self.logsumexp is not None and self.piece.open and self.position_bias is None
        return plain and self.missing is None and self.piece.words is None and _kernel(self.query.device) is not None

    def add_fused(self, target: Tensor) -> None:
        """Add all of it to ``target``, ``(sequences, rows, columns)``, by the kernel."""
        kernel = _kernel(self.query.device)
        assert kernel is not None
        group = self.call.query.shape[1] // self.call.key.shape[1]
        heads = range(self.call.query.shape[1]) if self.heads is None else self.heads
        served = torch.tensor([head // group for head in heads], dtype=torch.int32, device=self.query.device)
        kernel(target, self.query, self.key, served, self.logsumexp, self.softmax.scaling)

    @property
    def _budget(self) -> int:
        return BLOCK_ELEMENTS.get(self.query.device.type, BLOCK_ELEMENTS["other"])


@functools.cache
def _kernel(device: torch.device) -> Callable[..., None] | None:
    """Find the fused kernel; None on a CPU, and where triton is not installed."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from cagsr.attention.kernels import add_columns

    return add_columns


def _checkpointed(inputs: _Inputs, place: _Place, part: _Heads) -> Tensor:
    def found(query: Tensor, key: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Tensor:
        mask = _heads_of(inputs.mask(place), part.heads)
        columns = _cut(inputs.piece.columns, place.batch)
        return softmax_columns(query, key, mask, bias, sinks, columns, inputs.softmax.softcap, None)

    sinks = None if inputs.sinks is None else inputs.sinks[part.heads]
    return checkpoint(found, *inputs.block(place, part), sinks, use_reentrant=False, preserve_rng_state=False)


def _heads_of(mask: Tensor | None, heads: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else mask[:, heads]


def _cut(columns: slice | Tensor, batch: slice) -> slice | Tensor:
    return columns if isinstance(columns, slice) else columns[batch]


def _columns_of(tensor: Tensor, columns: slice | Tensor, dim: int) -> Tensor:
    """Pick the columns of a tensor with four dimensions, the first of them sequences; -1 picks any."""
    if isinstance(columns, slice):
        return tensor[(slice(None),) * dim + (columns,)]
    index = columns.clamp(min=0).view(columns.shape[0], *(columns.shape[1] if i == dim else 1 for i in range(1, 4)))
    shape = [columns.shape[0], *tensor.shape[1:]]
    tensor = tensor.expand(shape)
    shape[dim] = columns.shape[1]
    return tensor.gather(dim, index.expand(shape))


def _to_words(found: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Index and values for adding ``(sequences, rows, columns)`` to the words of the columns; -1: zero to word 0."""
    return words.clamp(min=0)[:, None, :].expand_as(found), _without(found, words < 0)


def _without(found: Tensor, columns: Tensor) -> Tensor:
    """Set some columns of ``(sequences, rows, columns)`` to 0."""
    return found.masked_fill(columns[:, None, :], 0.0)


def _step(count: int, most: int) -> int:
    """Find the size of the fewest equal steps of at most ``most`` (and at least 1)."""
    steps = -(-count // max(1, most))
    return -(-count // steps)
