"""A fused Triton kernel for CUDA: prompt columns from queries, keys and the log-sum-exp, summed over heads.

Its reference is ``probabilities.exponential_columns``: the same numbers, block by block in PyTorch. Here a program owns
one tile of the result and goes through all heads, so that no scores are written to memory at all. Import this file only
where triton is installed; ``rows.py`` does, for CUDA tensors. ``TRITON_INTERPRET=1`` runs it on a CPU for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 32, 64


def add_columns(
    target: Tensor, query: Tensor, key: Tensor, key_heads: Tensor, logsumexp: Tensor, scaling: float
) -> None:
    """Add ``exp(q·k scaling - logsumexp)``, summed over heads, to ``target`` ``(sequences, rows, columns)`` float32 in
    place; no gradients.

    ``query`` is ``(sequences, heads, rows, width)``, not scaled, ``key`` ``(sequences, key-value heads, columns, width)``
    of the same float dtype, ``key_heads`` ``(heads,)`` int32 the key-value head that serves each query head, ``logsumexp``
    ``(sequences, heads, rows)`` float32. Products of bfloat16 and float16 are summed in float32; float32 is multiplied in
    full precision, without TF32.
    """
    n, heads, rows, width = query.shape
    columns = key.shape[2]
    if 0 in (n, heads, rows, columns):
        return
    grid = (n, triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _add_columns[grid](
        target, query, key, key_heads, logsumexp, scaling, heads, rows, columns, width,
        *target.stride(), *query.stride(), *key.stride(), *logsumexp.stride(),
        ROWS=_ROWS, COLUMNS=_COLUMNS, WIDTH=max(16, triton.next_power_of_2(width)),
        FULL=query.dtype == torch.float32,
    )  # fmt: skip


@triton.jit
def _add_columns(  # type: ignore[no-untyped-def]  # triton reads the arguments, not their hints
    target, query, key, key_heads, logsumexp, scaling, heads, rows, columns, width,
    target_n, target_row, target_column,
    query_n, query_head, query_row, query_width,
    key_n, key_head, key_column, key_width,
    sum_n, sum_head, sum_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, WIDTH)
    row_in, column_in, part_in = row < rows, column < columns, part < width
    # 64 bits: rows times keys times heads of a long batch do not fit into 32.
    row_at, column_at = row.to(tl.int64), column.to(tl.int64)
    query_at = query + n * query_n + row_at[:, None] * query_row + part[None, :] * query_width
    key_at = key + n * key_n + column_at[None, :] * key_column + part[:, None] * key_width
    sum_at = logsumexp + n * sum_n + row_at * sum_row
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for head in range(heads):
        served = tl.load(key_heads + head).to(tl.int64)
        asked = tl.load(query_at + head * query_head, mask=row_in[:, None] & part_in[None, :], other=0.0)
        keys = tl.load(key_at + served * key_head, mask=part_in[:, None] & column_in[None, :], other=0.0)
        if FULL:  # noqa: SIM108  # a constexpr branch, taken at compile time
            scores = tl.dot(asked, keys, input_precision="ieee")
        else:
            scores = tl.dot(asked, keys)
        known = tl.load(sum_at + head * sum_head, mask=row_in, other=0.0)
        total += tl.exp(scores * scaling - known[:, None])
    target_at = target + n * target_n + row_at[:, None] * target_row + column_at[None, :] * target_column
    inside = row_in[:, None] & column_in[None, :]
    tl.store(target_at, tl.load(target_at, mask=inside, other=0.0) + total, mask=inside)
