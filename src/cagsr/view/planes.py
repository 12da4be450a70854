"""Attention of single layers and heads, all read in one forward, as far as a page has room for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.attention import Reading
from cagsr.attention.probe import AttentionLayers
from cagsr.flow import EpisodeBatch
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel

MOST_ELEMENTS = 4_000_000
"""Numbers, over all answers, that single layers and heads may take beside the attention that the reward reads."""


@dataclass(frozen=True)
class Plane:
    """One way to look at the attention."""

    layer: int | None
    """None: what the reward reads, the mean over its layers and heads."""
    head: int | None
    """None: the mean over the layer's heads."""


REWARD = Plane(None, None)


def planes_with_room(found: AttentionLayers, chosen: Sequence[int], elements: int) -> list[Plane]:
    """List the single layers and heads that a page has room for, besides what the reward reads.

    All layers with all heads, else all layers, else the chosen layers, else none.

    Args:
        found: the layers that can be read.
        chosen: numbers of the layers that the reward reads.
        elements: tokens of the prompt times tokens of the answers.
    """
    layers = [Plane(layer.number, None) for layer in found.layers]
    heads = [Plane(layer.number, head) for layer in found.layers for head in range(layer.heads)]
    some = [plane for plane in layers if plane.layer in chosen]
    some_heads = [plane for plane in heads if plane.layer in chosen]
    for choice in ([*layers, *heads], [*layers, *some_heads], layers, some):
        if len(choice) * elements <= MOST_ELEMENTS:
            return choice
    return []


def read_planes(
    loaded: LoadedModel, rollout: EpisodeBatch, found: AttentionLayers, planes: Sequence[Plane]
) -> dict[Plane, Tensor]:
    """Read single layers and heads in one forward: plane -> ``(batch, response, prompt)`` float32 on the CPU."""
    if not planes:
        return {}
    inputs = PassInputs.of(rollout)
    (region,) = loaded.architecture.regions(loaded.model, inputs)
    layers = {layer.number: layer for layer in found.layers}
    with torch.no_grad(), loaded.autocast(), ExitStack() as stack:
        readings = {}
        for plane in planes:
            assert plane.layer is not None
            layer = layers[plane.layer]
            heads: dict[int, tuple[int, ...] | None] = {layer.number: None if plane.head is None else (plane.head,)}
            reading = Reading({layer.module: layer}, heads, region, False, found.model_type)
            readings[plane] = stack.enter_context(reading)
        loaded.teacher_forced(inputs)
    return {
        plane: loaded.architecture.attention(loaded.model, inputs, [reading.attention]).cpu()
        for plane, reading in readings.items()
    }
