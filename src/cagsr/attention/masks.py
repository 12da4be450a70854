"""Which keys a row sees: every form of attention mask, brought to additive float32 rows for the rows that are read.

Follows ``transformers`` 5.23: ``integrations/sdpa_attention.py``, ``modeling_flash_attention_utils.py`` and
``masking_utils.py``. Nothing larger than the mask's chosen rows is made.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask
from transformers.utils.generic import is_flash_attention_requested

from cagsr.attention.intercept import Intercepted
from cagsr.errors import AttentionError

LOWEST = torch.finfo(torch.float32).min
"""Added where a key is not seen. Finite, as in transformers: a row that sees nothing stays free of NaN."""

Rows: TypeAlias = slice | Tensor
"""Query positions: one run for all sequences, or ``(sequences, rows)`` int64, none negative."""


def mask_rows(
    call: Intercepted, causal: bool, sequences: slice, rows: Rows, columns: slice = slice(None)
) -> Tensor | None:
    """Make what is added to the scores of the chosen sequences, query rows and key columns before the softmax.

    ``(sequences | 1, heads | 1, rows, keys)`` float32: 0 where a key is seen, ``LOWEST`` where it is not, or what an
    additive mask says; None where every key is seen. ``causal``: whether the module is, where no mask says so. A mask of a
    form that this implementation does not use is an AttentionError.
    """
    mask, keys = call.mask, call.key.shape[2]
    if is_flash_attention_requested(requested_attention_implementation=call.implementation):
        flash = _flash_rows(call, causal, sequences, rows)
        return None if flash is None else _additive(flash[..., columns])
    if mask is None:
        # Eager and flex functions do as the mask says; sdpa is causal by itself, but not for a single query. Its causal
        # rule counts from the upper left, so keys beyond the queries (an empty static cache) are never seen.
        queries = call.query.shape[2]
        if call.implementation in ("eager", "flex_attention") or not causal or queries == 1:
            return None
        column = torch.arange(keys, device=call.key.device)[columns]
        return _additive(_row_numbers(rows, call.key.device)[:, None, :, None] >= column)
    if isinstance(mask, BlockMask):
        return _additive(_block_rows(mask, call, sequences, rows)[..., columns])
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        form = f"a mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise AttentionError(
            f"The model hands its {call.implementation} attention {form}, and prompt attention can be read only under "
            f"masks of shape (batch, heads, queries, keys): load the model with attn_implementation='sdpa' or 'eager'."
        )
    return _additive(pick_rows(mask[..., :keys][..., columns], sequences, rows))


def pick_rows(tensor: Tensor, sequences: slice, rows: Rows) -> Tensor:
    """Pick rows of a ``(batch | 1, heads | 1, queries | 1, keys)`` tensor; sizes of 1 stay."""
    # A batch that is only expanded (a causal mask without padding) holds the same rows for every sequence.
    shared = tensor.shape[0] == 1 or tensor.stride(0) == 0
    tensor = tensor[:1] if shared else tensor[sequences]
    if tensor.shape[2] == 1:
        return tensor
    if isinstance(rows, slice):
        return tensor[:, :, rows]
    tensor = tensor.expand(rows.shape[0], -1, -1, -1)
    return tensor[torch.arange(rows.shape[0], device=rows.device)[:, None], :, rows].transpose(1, 2)


def _additive(rows: Tensor) -> Tensor:
    if rows.dtype == torch.bool:
        return torch.zeros(rows.shape, dtype=torch.float32, device=rows.device).masked_fill_(~rows, LOWEST)
    return rows.float().clamp(min=LOWEST)


def _row_numbers(rows: Rows, device: torch.device) -> Tensor:
    """``(1 | sequences, rows)``."""
    return torch.arange(rows.start, rows.stop, device=device)[None] if isinstance(rows, slice) else rows


def _flash_rows(call: Intercepted, causal: bool, sequences: slice, rows: Rows) -> Tensor | None:
    """``(sequences | 1, 1, rows, keys)`` bool under flash attention: causal from the lower right, window, segments."""
    device, (queries, keys) = call.key.device, (call.query.shape[2], call.key.shape[2])
    if call.mask is not None and (not isinstance(call.mask, Tensor) or call.mask.dim() != 2):
        raise AttentionError(
            f"The model hands its {call.implementation} attention a mask that is not of shape (batch, keys): load the "
            f"model with attn_implementation='sdpa' or 'eager'."
        )
    padding = None if call.mask is None else call.mask.bool()
    # A static cache holds more keys than have been seen; the mask's width says how many have.
    known = keys if padding is None else min(keys, padding.shape[1])
    row = (_row_numbers(rows, device) + (known - queries))[:, None, :, None]
    column = torch.arange(keys, device=device)
    seen = (column < known).expand(1, 1, row.shape[2], keys)
    if causal:
        seen = seen & (column <= row)
    window = call.options.get("sliding_window")
    if window is not None and keys > window:
        seen = seen & ((row - column).abs() < window)
    if padding is not None:
        seen = seen & torch.nn.functional.pad(padding, (0, keys - known))[sequences, None, None, :keys]
    segment = _segments(call, keys) if padding is None and queries == keys else None
    if segment is not None:
        seen = seen & (segment[row] == segment[column])
    return None if padding is None and segment is None and not causal and window is None else seen


def _segments(call: Intercepted, keys: int) -> Tensor | None:
    """``(keys,)`` the number of the packed sequence each position belongs to, as flash attention tells them apart."""
    starts = call.options.get("cu_seq_lens_k")
    if starts is None:
        positions = call.options.get("position_ids")
        if positions is None or call.query.shape[0] != 1 or positions.dim() != 2 or positions.shape[-1] != keys:
            return None
        return (positions[0] == positions.min()).cumsum(0)
    return torch.bucketize(torch.arange(keys, device=call.key.device), starts.to(call.key.device), right=True)


def _block_rows(mask: Any, call: Intercepted, sequences: slice, rows: Rows) -> Tensor:
    """``(sequences, 1, rows, keys)`` bool: the function behind a flex attention BlockMask, asked for our rows alone."""
    device = call.key.device
    batch = torch.arange(call.key.shape[0], device=device)[sequences]
    row = _row_numbers(rows, device).expand(len(batch), -1)
    column = torch.arange(call.key.shape[2], device=device)
    seen = mask.mask_mod
    for dims in ((None, None, None, 0), (None, None, 0, None), (0, None, 0, None)):
        seen = torch.vmap(seen, in_dims=dims)
    with TransformGetItemToIndex():
        return seen(batch, torch.zeros((), dtype=torch.int64, device=device), row, column)[:, None]
