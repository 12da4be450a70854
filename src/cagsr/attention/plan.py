"""How a region is read from a forward: worked out once, then used for every layer with the same mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.attention.intercept import Intercepted
from cagsr.attention.masks import LOWEST, Rows, mask_rows
from cagsr.attention.region import AttentionRegion
from cagsr.errors import AttentionError


@dataclass(frozen=True)
class Piece:
    """Sequences whose rows are read together, and where the result goes."""

    sequences: slice  # rows of the forward's batch
    rows: Rows  # query positions
    keys: slice  # key positions that any of the rows may see
    columns: slice | Tensor  # prompt columns within ``keys``; a tensor is (sequences, prompt), -1 where not seen
    mask: Tensor | None  # (sequences | 1, heads | 1, rows, keys) float32, added to the scores
    target: tuple[slice, slice, slice]  # sequences, response and prompt positions of the buffer


def plan_region(region: AttentionRegion, call: Intercepted, causal: bool) -> list[Piece]:
    """Divide ``region`` into the pieces in which it is read from a call like ``call``.

    One piece where every batch row holds one sequence. Packed sequences are a piece each, narrowed to the keys that
    their own mask rows let them see.

    Raises:
        AttentionError: the region lies outside the forward (its rows, columns or sequences do not exist).
    """
    batch, queries, keys = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    device = call.key.device
    # A sliding cache keeps only the last keys: columns move to the left, and those that have left are not seen.
    dropped = 0 if region.keys is None else max(0, region.keys - keys)
    _check(region, batch, queries, keys + dropped)
    n, response, prompt = region.shape
    if n == 0 or response == 0 or prompt == 0:
        return []
    if torch.equal(region.batch, torch.arange(n, device=region.batch.device)):
        rows: Rows = region.rows.to(device).clamp(min=0) if region.row_slice is None else region.row_slice
        sequences = slice(0, n)
        mask = mask_rows(call, causal, sequences, rows)
        whole = slice(0, n), slice(0, response)
        if region.column_slice is None:
            columns = region.columns.to(device)
            columns = torch.where(columns >= dropped, columns - dropped, -1)
            return [Piece(sequences, rows, slice(0, keys), columns, mask, (*whole, slice(0, prompt)))]
        source, target = _overlap(region.column_slice, slice(dropped, dropped + keys))
        return [Piece(sequences, rows, slice(0, keys), source, mask, (*whole, target))]
    return [piece for i in range(n) for piece in _packed_piece(region, call, causal, i)]


def _packed_piece(region: AttentionRegion, call: Intercepted, causal: bool, index: int) -> list[Piece]:
    rows, columns = (positions[index][positions[index] >= 0] for positions in (region.rows, region.columns))
    if len(rows) == 0 or len(columns) == 0:
        return []
    run, prompt = _run(rows), _run(columns)
    if run is None or prompt is None:
        raise AttentionError(f"The rows and columns of sequence {index} of a packed batch have to be unbroken runs.")
    sequences = slice(int(region.batch[index]), int(region.batch[index]) + 1)
    mask = mask_rows(call, causal, sequences, run)
    keys = slice(0, call.key.shape[2])
    if mask is not None:
        seen = (mask > LOWEST / 2).flatten(0, 2).any(0).nonzero()[:, 0]
        if len(seen) == 0:
            return []
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        mask = mask[..., keys].contiguous()
    source, target = _overlap(prompt, keys)
    return [Piece(sequences, run, keys, source, mask, (slice(index, index + 1), slice(0, len(rows)), target))]


def _overlap(columns: slice, keys: slice) -> tuple[slice, slice]:
    """Cut the columns to the keys; give what is left counted from the first key, and from the first column."""
    first, last = max(columns.start, keys.start), min(columns.stop, keys.stop)
    last = max(first, last)
    return slice(first - keys.start, last - keys.start), slice(first - columns.start, last - columns.start)


def _run(positions: Tensor) -> slice | None:
    first, count = int(positions[0]), len(positions)
    run = torch.arange(first, first + count, device=positions.device)
    return slice(first, first + count) if torch.equal(positions, run) else None


def _check(region: AttentionRegion, batch: int, queries: int, keys: int) -> None:
    for what, positions, limit, have in (
        ("the batch row", region.batch, batch, "rows"),
        ("the query position", region.rows, queries, "query positions"),
        ("the key position", region.columns, keys, "key positions"),
    ):
        if positions.numel() and (highest := int(positions.max())) >= limit:
            raise AttentionError(
                f"The attention region asks for {what} {highest}, but this forward has {limit} {have}, counted "
                f"from 0: make the region for the tensors of this forward."
            )
    for what, run, limit in (("rows", region.row_slice, queries), ("columns", region.column_slice, keys)):
        if run is not None and run.stop > limit and run.stop > run.start:
            raise AttentionError(
                f"The attention region asks for the {what} up to {run.stop}, but this forward has only {limit}: make "
                f"the region for the tensors of this forward."
            )
