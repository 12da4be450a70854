"""Gradient checkpointing for the update's passes alone: without dropout, and off wherever no gradients are wanted.

transformers ties checkpointing to a layer's training mode, and a layer in that mode drops its key-value cache, also where
no gradients are taken: a decoding loop would see nothing but the newest token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_without_dropout(model: nn.Module) -> None:
    """Switch on gradient checkpointing of a model in evaluation mode and keep dropout off all the same.

    Only the checkpointed layers themselves are put in training mode, not what is inside them, and their own dropout
    rates (attributes used in functional calls) are set to zero.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "enable_input_require_grads") and hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name in ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether a pass through the model would be checkpointed now, and so keep no keys and values."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's layers compute as they do without checkpointing, and use a key-value cache.

    Sampling and scoring take no gradients, so they have nothing to save memory for.
    """
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer) and one.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
