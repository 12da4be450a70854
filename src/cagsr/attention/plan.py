"""How a region is read from a forward: worked out once, then used for every layer with the same mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.attention.intercept import Intercepted
from cagsr.attention.masks import LOWEST, Rows, mask_rows
from cagsr.attention.region import AttentionRegion
from cagsr.errors import AttentionError

_CHUNK = 1 << 20
"""Elements of a mask looked at together: nothing as large as rows times keys is made for a long prompt."""


@dataclass(frozen=True)
class Piece:
    """Sequences whose rows are read together, and where the result goes."""

    sequences: slice  # rows of the forward's batch
    rows: Rows  # query positions
    keys: slice  # key positions that any of the rows may see
    columns: slice | Tensor  # prompt columns within ``keys``; a tensor is (sequences, columns), -1 where not seen
    target: tuple[slice, slice, slice]  # sequences, response and prompt positions (or words) of the buffer
    causal: bool = True  # what the rows see where no mask says so
    open: bool = False  # every row sees every column (padding aside, which is cleared in the end)
    words: Tensor | None = None  # (sequences, columns): where in the buffer each column is added; -1: nowhere


def plan_region(region: AttentionRegion, call: Intercepted, causal: bool) -> list[Piece]:
    """Divide ``region`` into the pieces in which it is read from a call like ``call``; AttentionError where it lies outside.

    One piece where every batch row holds one sequence. Packed sequences are a piece each, narrowed to the keys that
    their own mask rows let them see.
    """
    batch, queries, keys = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    device = call.key.device
    # A sliding cache keeps only the last keys: columns move to the left, and those that have left are not seen.
    dropped = 0 if region.keys is None else max(0, region.keys - keys)
    _check(region, batch, queries, keys + dropped)
    n, response, width = region.shape
    if n == 0 or response == 0 or width == 0 or region.columns.shape[1] == 0:
        return []
    if not torch.equal(region.batch, torch.arange(n, device=region.batch.device)):
        return [piece for i in range(n) for piece in _packed_piece(region, call, causal, i)]
    rows: Rows = region.rows.to(device).clamp(min=0) if region.row_slice is None else region.row_slice
    columns, target = region.column_slice, slice(0, width)
    words = None if region.words is None else region.words.to(device)
    if columns is None:
        positions = region.columns.to(device)
        columns = torch.where(positions >= dropped, positions - dropped, -1)
    else:
        columns, target = _overlap(columns, slice(dropped, dropped + keys))
    # Only the log-sum-exp makes the mask of the columns superfluous: without it, all keys are weighed.
    is_open = call.logsumexp is not None and all(_sees_all(region, call, causal, i, dropped) for i in range(n))
    whole = slice(0, n), slice(0, response), target
    return [Piece(slice(0, n), rows, slice(0, keys), columns, whole, causal, is_open, words)]


def _packed_piece(region: AttentionRegion, call: Intercepted, causal: bool, index: int) -> list[Piece]:
    rows, columns = (positions[index][positions[index] >= 0] for positions in (region.rows, region.columns))
    if len(rows) == 0 or len(columns) == 0:
        return []
    run, prompt = _run(rows), _run(columns)
    if run is None:
        raise AttentionError(f"The rows of sequence {index} of a packed batch have to be an unbroken run.")
    sequence = slice(int(region.batch[index]), int(region.batch[index]) + 1)
    keys = _seen_keys(call, causal, sequence, run)
    if keys is None:
        return []
    is_open = call.logsumexp is not None and _sees_all(region, call, causal, index, 0)
    place = slice(index, index + 1), slice(0, len(rows))
    if prompt is not None and region.words is None:
        source, target = _overlap(prompt, keys)
        return [Piece(sequence, run, keys, source, (*place, target), causal, is_open)]
    positions = region.columns[index : index + 1].to(call.key.device)
    inside = (positions >= keys.start) & (positions < keys.stop)
    positions = torch.where(inside, positions - keys.start, -1)
    words = None if region.words is None else region.words[index : index + 1].to(positions.device)
    target = slice(0, region.shape[2])
    return [Piece(sequence, run, keys, positions, (*place, target), causal, is_open, words)]


def _seen_keys(call: Intercepted, causal: bool, sequence: slice, rows: slice) -> slice | None:
    """Find the run of keys outside which none of the rows sees anything; None: they see nothing at all."""
    first, last = call.key.shape[2], 0
    step = max(1, _CHUNK // call.key.shape[2])
    for start in range(rows.start, rows.stop, step):
        mask = mask_rows(call, causal, sequence, slice(start, min(start + step, rows.stop)))
        if mask is None:
            return slice(0, call.key.shape[2])
        seen = (mask > LOWEST / 2).flatten(0, 2).any(0).nonzero()[:, 0]
        if len(seen):
            first, last = min(first, int(seen[0])), max(last, int(seen[-1]) + 1)
    return slice(first, last) if last > first else None


def _sees_all(region: AttentionRegion, call: Intercepted, causal: bool, index: int, dropped: int) -> bool:
    """Whether each row of a sequence sees each of its columns, padding aside: then they need no mask."""
    device = call.key.device
    rows, columns = (positions[index].to(device) for positions in (region.rows, region.columns))
    rows, columns = rows[rows >= 0], columns[columns >= dropped] - dropped
    if len(rows) == 0 or len(columns) == 0:
        return True
    if call.mask is None and call.implementation == "sdpa":
        return not causal or call.query.shape[2] == 1 or bool(rows.min() >= columns.max())
    first, last = int(columns.min()), int(columns.max()) + 1
    sequence = slice(int(region.batch[index]), int(region.batch[index]) + 1)
    for part in rows.split(max(1, _CHUNK // (last - first))):
        mask = mask_rows(call, causal, sequence, part[None], slice(first, last))
        if mask is not None and not bool((mask[..., columns - first] == 0).all()):
            return False
    return True


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
