"""Which modules of a model do the attention that is read: found by one tiny forward, not by names."""

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cagsr.attention.intercept import Intercepted, listening
from cagsr.errors import AttentionError

_DECODER_TOKENS, _ENCODER_TOKENS = 5, 7  # unequal, so that cross-attention shows by its number of keys


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module that can be read."""

    number: int
    """The model's own layer number (``layer_idx``, from 0)."""
    module: nn.Module
    heads: int
    """Query heads."""


@dataclass(frozen=True)
class AttentionLayers:
    """What the probe found, in the order of the layers."""

    model_type: str
    cross: bool
    """The decoder's cross-attention of an encoder-decoder model; else causal self-attention."""
    layers: tuple[AttentionLayer, ...]
    total: int
    """Layers the model has in all, with and without readable attention."""


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Find the transformers model inside ``model``, which may be wrapped by peft, DDP or a value head.

    AttentionError where there is none, or peft puts virtual tokens before the prompt, which would shift its positions.
    """
    for module in model.modules():
        for config in dict(getattr(module, "peft_config", None) or {}).values():
            if getattr(config, "is_prompt_learning", False):
                raise AttentionError(
                    f"Prompt attention can't be read under peft's {getattr(config, 'peft_type', 'prompt learning')}, "
                    f"which puts virtual tokens before the prompt: use LoRA."
                )
        if isinstance(module, PreTrainedModel):
            return module
    raise AttentionError(f"A {type(model).__name__} holds no transformers model whose attention could be read.")


def layer_count(model: PreTrainedModel) -> int:
    """How many layers the stack has that says the answer, by its config; 0 where it doesn't say."""
    config = model.config.get_text_config(decoder=True)
    # BART's decoder_layers are those of its defaults here: transformers calls the decoder's own number num_hidden_layers.
    counts = [getattr(config, name, None) for name in ("num_decoder_layers", "num_hidden_layers")]
    return next((int(count) for count in counts if count), 0)


def looks_across(model: nn.Module) -> bool:
    """Whether a decoder looks at images or sounds by cross-attention, beside what it looks at of the text: images in layers of
    their own (mllama), sounds in every layer (Whisper).
    """
    inner = transformers_model(model)
    return "cross_attention_states" in inspect.signature(inner.forward).parameters or hears(inner)


def hears(model: PreTrainedModel) -> bool:
    """Whether an encoder reads sounds, so that the text is the decoder's alone."""
    return bool(model.config.is_encoder_decoder) and "input_features" in inspect.signature(model.forward).parameters


def silence(model: PreTrainedModel, states: int = 1) -> BaseModelOutput:
    """Encoder states ``(1, states, width)`` of no sound, for a model that :func:`hears`: its encoder takes sounds of one length."""
    width, like = int(model.config.hidden_size), next(model.parameters())
    return BaseModelOutput(last_hidden_state=torch.zeros(1, states, width, dtype=like.dtype, device=like.device))


def find_attention_layers(model: nn.Module, *, images: bool = False) -> AttentionLayers:
    """Run a forward over a few tokens and note which modules call transformers' attention interface.

    No image or sound takes part, so what encodes them is never among them. ``images``: of a model that :func:`looks_across`, the
    layers that look at images or sounds, which are handed a few states of one.

    Evaluation mode, no gradients; training flags and random number generators are restored. AttentionError where no layer of the
    model calls the interface (the message names the model type and the layers), or the tiny forward fails.
    """
    inner = transformers_model(model)
    cross = images or (bool(getattr(inner.config, "is_encoder_decoder", False)) and not hears(inner))
    model_type = str(getattr(inner.config, "model_type", type(inner).__name__))
    total = layer_count(inner)
    calls: Counter[nn.Module] = Counter()
    layers: list[AttentionLayer] = []

    def note(module: nn.Module, call: Intercepted) -> None:
        queries, keys = call.query.shape[2], call.key.shape[2]
        if queries != _DECODER_TOKENS or keys != (_ENCODER_TOKENS if cross else _DECODER_TOKENS):
            return
        calls[module] += 1
        if calls[module] == 1:
            number = getattr(module, "layer_idx", None)
            number = len(layers) if number is None else int(number)
            layers.append(AttentionLayer(number, module, call.query.shape[1]))

    with _quiet(inner), listening(inner.modules(), note):
        _tiny_forward(inner, cross, model_type, images)
    if not layers:
        which = f"none of its {total} layers calls" if total else "it never calls"
        raise AttentionError(
            f"The attention of a {model_type} model ({type(inner).__name__}) can't be read, because {which} "
            f"transformers' attention interface: use a model that does, such as Llama, Qwen, Gemma, Mistral, GPT-2, "
            f"GPT-NeoX, T5 or BART."
        )
    if repeated := [layer for layer in layers if calls[layer.module] > 1]:
        raise AttentionError(
            f"The attention of a {model_type} model ({type(inner).__name__}) can't be read, because the "
            f"attention module of layer {repeated[0].number} calls the attention interface "
            f"{calls[repeated[0].module]} times in one forward."
        )
    layers.sort(key=lambda layer: layer.number)
    return AttentionLayers(model_type, cross, tuple(layers), max(total, layers[-1].number + 1))


def _tiny_forward(model: PreTrainedModel, cross: bool, model_type: str, images: bool) -> None:
    accepted = inspect.signature(model.forward).parameters
    vocabulary = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 0) or 2)
    device = model.device

    def ids(count: int) -> torch.Tensor:
        # Low ids are in every vocabulary; all alike would also do, but some models look for padding among them.
        return (torch.arange(count, device=device) % max(1, min(vocabulary - 1, 8)) + 1).clamp(max=vocabulary - 1)[None]

    inputs: dict[str, Any] = {"input_ids": ids(_ENCODER_TOKENS if cross and not images else _DECODER_TOKENS)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if hears(model):
        inputs = {"decoder_input_ids": ids(_DECODER_TOKENS), "encoder_outputs": silence(model, _ENCODER_TOKENS)}
    elif images:
        width = int(model.config.get_text_config(decoder=True).hidden_size)
        inputs["cross_attention_states"] = torch.zeros(1, _ENCODER_TOKENS, width, dtype=model.dtype, device=device)
    elif cross:
        inputs["decoder_input_ids"] = ids(_DECODER_TOKENS)
    options = {"use_cache": False} if "use_cache" in accepted else {}
    try:
        model(**{name: value for name, value in inputs.items() if name in accepted}, **options)
    except Exception as error:  # whatever a model's own code raises: the user needs its name and the reason
        reason = (str(error).splitlines() or [""])[0]
        raise AttentionError(
            f"The attention of a {model_type} model ({type(model).__name__}) can't be read, because a forward over a "
            f"few tokens fails: {type(error).__name__}: {reason}"
        ) from error


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; training flags and random number generators as before afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = sorted(
        {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    )
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
