"""Which key-value caches can be cut to some of their rows, or have rows repeated or replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


def rows_can_be_picked(cache: Any) -> bool:
    """Whether every layer of a cache grows with its rows side by side; not so state-space layers and static caches.

    Args:
        cache: what a forward returned as ``past_key_values``; anything that is no ``Cache`` gives False.
    """
    if not isinstance(cache, Cache):
        return False
    parts = [part for name in ("self_attention_cache", "cross_attention_cache") if (part := getattr(cache, name, None))]
    if parts:
        return all(rows_can_be_picked(part) for part in parts)
    return all(type(layer) in _LAYERS for layer in cache.layers)


def put_rows(cache: Cache, index: Tensor, rows: Cache) -> None:
    """Replace some rows of a cache by those of another that has seen as many tokens.

    Args:
        cache: one that ``rows_can_be_picked`` says yes of; changed in place.
        index: ``(n,)`` int64, which rows.
        rows: a cache of ``n`` rows.
    """
    for layer, other in zip(cache.layers, rows.layers, strict=True):
        for name in ("keys", "values", "indexer_keys"):  # rows come first in all of them
            if isinstance(kept := getattr(layer, name, None), Tensor):
                kept[index] = getattr(other, name)
