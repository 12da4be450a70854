"""Which key-value caches can be cut to some of their rows, or have rows repeated."""

from __future__ import annotations

from typing import Any

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
