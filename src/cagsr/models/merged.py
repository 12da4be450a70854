"""LoRA adapters put into their matrices for a while: for sampling, which reads each matrix once a token.

A layer with an adapter makes three products where one would do, and adds them up: in a decoding step, where the matrices are
read for a few rows only, that is half of the time. Here ``W + BA`` stands in for ``W`` as a tensor of its own, and ``W``
itself is put back afterwards: nothing is subtracted, so nothing is rounded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cagsr.models.sharding import is_sharded

MOST_OF_MEMORY = 1 / 8
"""Adapters are merged where the copies take at most this share of the device's memory. Of all, not of what is free: a
resumed run must do what one never stopped does."""


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block, for passes without gradients, plain LoRA layers compute with one matrix; bit for bit as before after it.

    Left as they are: adapters of other kinds (DoRA, embeddings), quantised or divided matrices, models whose copies would
    be too large, and matrices in half precision, where rounding ``W + BA`` would lose a small adapter.
    """
    layers = _mergeable(model)
    kept: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                (adapter,) = layer.active_adapters
                weight = layer.get_base_layer().weight
                kept.append((layer, weight.data))
                weight.data = weight.data + layer.get_delta_weight(adapter)
                layer.merged_adapters.append(adapter)
        yield
    finally:
        for layer, weight in kept:
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data = weight


def _mergeable(model: nn.Module) -> list[Any]:
    """The layers whose adapter can be put into the matrix; none where the copies would take too much memory."""
    if not hasattr(model, "peft_config") or is_sharded(model):
        return []
    from peft.tuners.lora import Linear  # brings peft, which takes its time
    from transformers.pytorch_utils import Conv1D

    def plain(layer: Linear) -> bool:
        base, adapters = layer.get_base_layer(), layer.active_adapters
        return (
            type(layer) is Linear
            and type(base) in (nn.Linear, Conv1D)
            and base.weight.dtype == torch.float32
            and not (layer.disable_adapters or layer.merged or layer.lora_variant)
            and len(adapters) == 1
            and adapters[0] in layer.lora_A
            and not layer.lora_bias[adapters[0]]
        )

    layers = [module for module in model.modules() if isinstance(module, Linear) and plain(module)]
    size = sum(layer.get_base_layer().weight.nbytes for layer in layers)
    return layers if layers and size <= MOST_OF_MEMORY * _memory(layers[0].get_base_layer().weight.device) else []


def _memory(device: torch.device) -> int:
    """All memory of a device, bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
