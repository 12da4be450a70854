"""What a conversation's turns have read and said, as keys and values: the next turn reads only what is new in it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from cagsr.models.lengths import length_borders

Layers = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``(rows, heads, tokens, width)``."""


@dataclass(frozen=True)
class RowKeys:
    """One row's: the tokens ``ids`` and their keys and values in each layer, ``(heads, tokens, width)``."""

    ids: tuple[int, ...]
    layers: Layers
    window: int | None
    """The smallest sliding window of a layer: rows padded to more columns would fall out of it early."""


@dataclass
class TurnKeys:
    """The rows of a rollout, in their order; empty before the first turn, filled anew by each."""

    rows: list[RowKeys | None] = field(default_factory=list)

    def pick(self, rows: Sequence[int]) -> None:
        """Keep the rows that go on."""
        self.rows = [self.rows[row] for row in rows] if self.rows else []


@dataclass(frozen=True)
class LaidOut:
    """Prompts behind kept keys: known tokens up to a column that is the same for all rows, then the new ones.

    ``ids`` ``(rows, columns)`` int64 and ``real`` bool; both parts are padded on the left. ``layers`` have the known columns.
    """

    ids: Tensor
    real: Tensor
    layers: Layers


def lay_out(ids: Tensor, real: Tensor, keys: TurnKeys, pad: int, room: int) -> LaidOut | None:
    """Put prompts behind the keys of their beginnings; None where a row has none, or wouldn't fit into a sliding window.

    ``ids`` and ``real`` ``(rows, prompt)``: padded prompts. ``room`` is how many tokens may follow. A row's last token is
    always new: its logits are asked for.
    """
    rows = [one for one in keys.rows if one is not None]
    if not rows or len(rows) != len(ids):
        return None
    texts = [one[kept].tolist() for one, kept in zip(ids, real, strict=True)]
    known = [_common(row.ids, text[:-1]) for row, text in zip(rows, texts, strict=True)]
    old, new = max(known), max(len(text) - count for text, count in zip(texts, known, strict=True))
    window = rows[0].window
    if not min(known) or (window is not None and old + new + room > window):
        return None
    wide = ids.new_full((len(rows), old + new), pad)
    filled = torch.zeros_like(wide, dtype=torch.bool)
    for row, (text, count) in enumerate(zip(texts, known, strict=True)):
        for end, part in ((old, text[:count]), (old + new, text[count:])):
            wide[row, end - len(part) : end] = wide.new_tensor(part)
            filled[row, end - len(part) : end] = True
    layers = []
    for number in range(len(rows[0].layers)):
        padded = [
            torch.stack(
                [
                    nn.functional.pad(row.layers[number][which][:, :count], (0, 0, old - count, 0))
                    for row, count in zip(rows, known, strict=True)
                ]
            )
            for which in (0, 1)
        ]
        layers.append((padded[0], padded[1]))
    return LaidOut(wide, filled, layers)


def row_keys(cache: Any, row: int, ids: Tensor, real: Tensor) -> RowKeys | None:
    """Copy a row's keys and values out of a forward's cache; None where its layers keep anything else, or not all of it.

    ``ids`` and ``real`` ``(columns,)``: the row's tokens, of which the cache may lack the last.
    """
    if not isinstance(cache, Cache) or any(
        type(one) not in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers
    ):
        return None
    kept = [one for one in cache.layers if isinstance(one.keys, Tensor) and one.keys.numel()]
    columns = min(cache.get_seq_length(), len(ids))
    if not kept or any(one.keys.shape[2] < columns for one in kept):
        return None
    places = real[:columns].nonzero()[:, 0]
    windows = [one.sliding_window for one in kept if isinstance(one, DynamicSlidingWindowLayer)]
    layers = [(one.keys[row].index_select(1, places), one.values[row].index_select(1, places)) for one in kept]
    return RowKeys(tuple(ids[places].tolist()), layers, min(windows, default=None))


def can_go_on(model: PreTrainedModel) -> bool:
    """Whether the model, given kept keys, finds for new tokens what it finds with all tokens: asked of it once, by a tiny batch.

    Not so models whose keys change with length, or that count columns and not tokens; their turns read all that was said.
    """
    if model not in _KNOWN:
        _KNOWN[model] = not model.config.is_encoder_decoder and not length_borders(model) and _agrees(model)
    return _KNOWN[model]


_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TOLERANCE = {torch.float32: 1e-4}


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Rows of six and of three tokens, of which four and two are known: the hole between known and new is two columns wide."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(12, device=device).remainder(vocabulary).view(2, 6)
    real = torch.tensor([[1] * 6, [0] * 3 + [1] * 3], device=device).bool()
    whole = _logits(model, ids, real, None)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    known = torch.tensor([[1] * 4, [0] * 2 + [1] * 2], device=device).bool()
    first = torch.cat([ids[:1, :4], torch.nn.functional.pad(ids[1:, 3:5], (2, 0))])
    _logits(model, first, known, cache)
    rows = [row_keys(cache, row, first[row], known[row]) for row in range(2)]
    laid = lay_out(ids, real, TurnKeys(rows), 0, 1)
    if laid is None:
        return False
    again = DynamicCache(config=model.config.get_text_config(decoder=True))
    put_in(again, laid.layers)
    found = _logits(model, laid.ids, laid.real, again)
    tolerance = _TOLERANCE.get(whole.dtype, 0.1) * max(1.0, float(whole.abs().max()))
    return float((found.float() - whole.float()).abs().max()) <= tolerance


def put_in(cache: Cache, layers: Layers) -> None:
    """Fill an empty cache."""
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)


def _logits(model: PreTrainedModel, ids: Tensor, real: Tensor, cache: Cache | None) -> Tensor:
    """Of the last column, as ``generate`` asks for them, ``(rows, vocabulary)``."""
    new = ids.shape[1] - (0 if cache is None else cache.get_seq_length())
    kwargs: dict[str, Any] = {"attention_mask": real.long(), "use_cache": cache is not None, "past_key_values": cache}
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = model._prepare_position_ids_for_generation(ids, kwargs)
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=new, is_first_iteration=True, **kwargs)
    logits: Tensor = model(**inputs, return_dict=True).logits[:, -1]
    return logits


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items two sequences begin with alike."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
