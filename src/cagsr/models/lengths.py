"""Models whose computation changes with length, made a function of each row alone.

The next token's distribution is what the model gives for exactly the tokens before it, whatever lies beside them in the
batch, and whether or not keys are cached. Most models are like that. Not so some in transformers:

- ``longrope`` (Phi-3; LongRoPE, arXiv 2402.13753) has one set of rotary frequencies up to
  ``original_max_position_embeddings`` tokens and another above, and the longest row decides for the whole batch. Here each
  row is turned by its own length. All keys of a row change at that border, so a cache must be made anew there.
- ``dynamic`` (NTK) rotary frequencies are others for every length above ``max_position_embeddings``, and stay those of an
  earlier, longer batch for a while: no cache and no single pass over an answer gives that. Refused above the limit.
- Llama 4 and Inkling warm their attention by positions that count the padding. Refused where it makes a difference.
- The experts of a Switch Transformer take no more than ``expert_capacity`` tokens of a pass, which decoding token by
  token never fills. Refused above it.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cagsr.errors import ModelError


def length_borders(model: nn.Module) -> tuple[int, ...]:
    """Prepare a transformers or peft model, once, so that its rows are independent, and say where its computation changes.

    Hooks are put on rotary embeddings that depend on length. Gives numbers of tokens, ascending: beyond each, all keys of a
    row are others. Empty for most models.
    """
    if model not in _PREPARED:
        _PREPARED[model] = _prepare(model)
    return _PREPARED[model]


@contextmanager
def read_as_long_as(lengths: Tensor) -> Iterator[None]:
    """Inside the block each row's rotary frequencies are those of a given length ``(rows,)``, not of its largest position."""
    token = _LENGTHS.set(lengths)
    try:
        yield
    finally:
        _LENGTHS.reset(token)


_PREPARED: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()
_LENGTHS: ContextVar[Tensor | None] = ContextVar("lengths", default=None)
_HOOKED = "_cagsr_by_row"  # on the module, so that a deep copy, which has the hooks too, is not hooked twice


def _prepare(model: nn.Module) -> tuple[int, ...]:
    borders: set[int] = set()
    warm_from: list[int] = []
    for module in model.modules():
        kinds = _rope_kinds(module)
        longrope = [layer_type for layer_type, kind in kinds.items() if kind == "longrope"]
        borders |= {_border(module, layer_type) for layer_type in longrope}
        if longrope and _is_new(module):
            module.register_forward_hook(_turn_by_row, with_kwargs=True)
        elif any("dynamic" in kind for kind in kinds.values()) and _is_new(module):
            module.register_forward_pre_hook(_refuse_long_dynamic, with_kwargs=True)
        if type(module).__name__ == "SwitchTransformersStack" and module.is_decoder and _is_new(module):
            module.register_forward_pre_hook(_refuse_full_experts, with_kwargs=True)
        warm_from += _warm_from(module)
    for module in model.modules():
        if not (borders or warm_from) or not isinstance(module, PreTrainedModel):
            continue
        if {"attention_mask", "position_ids"} <= set(inspect.signature(module.forward).parameters) and _is_new(module):
            module.register_forward_pre_hook(
                partial(_refuse_padding, min(warm_from)) if warm_from else _fill_positions, with_kwargs=True
            )
    return tuple(sorted(borders))


def _is_new(module: nn.Module) -> bool:
    """Whether the module has no hook of ours yet; from now on it counts as having one."""
    new = not getattr(module, _HOOKED, False)
    setattr(module, _HOOKED, True)
    return new


def _rope_kinds(module: nn.Module) -> dict[str | None, str]:
    """The rope type of a rotary embedding, by layer type where it has several (Gemma 3)."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return {str(name): str(one) for name, one in kind.items()} if isinstance(kind, Mapping) else {}


def _border(module: nn.Module, layer_type: str | None) -> int:
    parameters = module.config.rope_parameters
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a rotary embedding's forward by their names."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _turn_by_row(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a ``longrope`` embedding: cosines and sines of each row by its own length."""
    x, position_ids, *rest = _call(module, args, kwargs).values()
    layer_type = rest[0] if rest else None
    if _rope_kinds(module)[layer_type] != "longrope":
        return None
    border = _border(module, layer_type)
    if position_ids.dim() != 2:  # several positions a token (images): none of the models trained here
        raise ModelError(
            f"{type(module).__name__} with {position_ids.dim() - 1} positions a token can't be read by row."
        )
    lengths = _LENGTHS.get()
    long = (position_ids.amax(dim=1) + 1 if lengths is None else lengths) > border
    if bool((long == (position_ids.max() >= border)).all()):
        return None  # as the longest row is read, all are
    position_ids = position_ids.expand(len(long), -1)
    order, parts = [], []
    for is_long in (False, True):
        rows = (long == is_long).nonzero()[:, 0]
        if len(rows):
            own = position_ids[rows]
            # transformers asks for the largest position: one more column, cut off again, makes it long.
            own = torch.cat([own, torch.full_like(own[:, :1], border)], dim=1) if is_long else own.clamp(max=border - 1)
            order.append(rows)
            read = module.forward(x, own, *rest)
            read = (read,) if isinstance(read, Tensor) else read
            parts.append([part[:, : position_ids.shape[1]] for part in read])
    place = torch.cat(order).argsort()
    found = tuple(torch.cat(part)[place] for part in zip(*parts, strict=True))
    return found[0] if isinstance(output, Tensor) else found


def _refuse_long_dynamic(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = _call(module, args, kwargs)
    if "dynamic" not in _rope_kinds(module)[arguments.get("layer_type")]:
        return
    limit, length = int(module.original_max_seq_len), int(arguments["position_ids"].max()) + 1
    if length > limit:
        raise ModelError(
            f"{length} tokens: with rope type dynamic this {_kind(module)} model is another for every length beyond its "
            f"max_position_embeddings of {limit}, so that what is sampled can't be scored; keep prompt and answer within "
            "that, or give its config a rope type that does not change with length, such as yarn."
        )


def _fill_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a model: where no positions are given, count real tokens; the model itself counts the padding."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if kwargs.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2 or ids is None:
        return None
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return args, kwargs | {"position_ids": positions}


def _refuse_padding(limit: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= limit and not bool(mask[:, 0].all()):
        raise ModelError(
            f"{mask.shape[1]} tokens: from {limit} tokens on this {_kind(module)} model scales its attention by positions "
            "that count the padding, so that prompts of different lengths in a batch would change each other; use shorter "
            "prompts and answers, or one prompt at a time."
        )


def _refuse_full_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids, capacity = kwargs.get("input_ids"), int(module.config.expert_capacity)
    if isinstance(ids, Tensor) and ids.shape[1] > capacity:
        raise ModelError(
            f"Answers of {ids.shape[1]} tokens: the experts of this switch_transformers model take at most expert_capacity "
            f"{capacity} tokens of a pass, while decoding token by token never fills them, so that what is sampled can't be "
            "scored; ask for shorter answers, or raise expert_capacity in its config."
        )


def _warm_from(module: nn.Module) -> list[int]:
    """From how many tokens on an attention module scales by positions that count the padding, if it does."""
    config = getattr(module, "config", None)
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        return [int(module.floor_scale)]
    if type(module).__name__ == "InklingAttention" and not module.is_sliding and config.log_scaling_n_floor is not None:  # type: ignore[union-attr]
        return [int(config.log_scaling_n_floor) + 1]  # type: ignore[union-attr]
    return []


def _kind(module: nn.Module) -> str:
    return str(getattr(module.config, "model_type", type(module).__name__))
