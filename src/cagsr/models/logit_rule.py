"""What a model makes of its output layer's numbers: known by name, and asked of the model itself before it is believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cagsr.models.architecture import Architecture
from cagsr.models.inputs import PassInputs

LARGE = 50.0
"""How large the numbers are made by which a model is asked: a soft cap shows only where it is reached."""
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""What configs call a factor of the logits (Cohere, Falcon-H1) or, some, its reciprocal (Granite)."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Differences between logits that are rounding, as shares of the largest."""


@dataclass(frozen=True)
class LogitRule:
    """Logits are ``cap * tanh(scale * numbers / cap)`` of what the output layer gives; no ``cap``: ``scale * numbers``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, numbers: Tensor) -> Tensor:
        """Logits ``(..., vocabulary)`` float32."""
        logits = numbers.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


@torch.no_grad()
def find_logit_rule(
    model: nn.Module, architecture: Architecture, device: torch.device, dtype: torch.dtype
) -> LogitRule | None:
    """The rule by which this model's own forward pass makes logits of its output layer's numbers, which are ``dtype``.

    None where none that is known fits: the layer can't be run by itself then.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        return None
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        hidden = hidden * (LARGE / module.forward(hidden).abs().max().clamp(min=1e-6)).to(hidden.dtype)
        seen.append(hidden)
        return (hidden,)

    handle = layer.register_forward_pre_hook(enlarge)
    try:
        found = architecture.logits(model, PassInputs.tiny(device), 0).float()
    finally:
        handle.remove()
    if len(seen) != 1:
        return None
    numbers = layer(seen[0]) + added_bias(model)
    allowed = _TOLERANCE[dtype] * max(1.0, float(found.abs().max()))
    for rule in _candidates(model):
        made = rule(numbers)
        if made.shape == found.shape and float((made - found).abs().max()) <= allowed:
            return rule
    return None


def added_bias(model: nn.Module) -> Tensor | float:
    """What some encoder-decoder models (BART's family) add to the numbers, outside of their output layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    bias: Tensor | float = getattr(base, "final_logits_bias", 0.0)
    return bias[0] if isinstance(bias, Tensor) else 0.0


def _candidates(model: nn.Module) -> Iterator[LogitRule]:
    config = model.config
    decoder = getattr(config, "decoder", None)
    sources = [config.get_text_config(), config, *([decoder] if hasattr(decoder, "to_dict") else [])]
    scales = [1.0]
    for name in _SCALES:
        for value in (getattr(source, name, None) for source in sources):
            if isinstance(value, int | float) and value not in (0, 1):
                scales += [float(value), 1 / value]
    caps = [getattr(source, "final_logit_softcapping", None) for source in sources]
    for cap in [*(float(cap) for cap in caps if cap), None]:
        for scale in scales:
            yield LogitRule(scale, cap)
