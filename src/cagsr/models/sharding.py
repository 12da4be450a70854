"""Weights divided among processes (FSDP2): dividing them, holding them whole for a while, and to and from files.

Everything here does nothing, or hands back what it got, for a model that is not sharded.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from cagsr.config import LoraConfig, ModelConfig
from cagsr.models.load import LoadedModel, load_model


def shard(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Divide a module's weights among the processes layer by layer, in place, and hand the optimizer its new parameters.

    ``accelerator`` is configured for FSDP2; the optimizer, before its first step, has the parameters of ``module``, the policy
    with what belongs to it.
    """
    _wrap_layers(accelerator, module)
    accelerator.prepare(module, optimizer)
    _free_layers_after_forward(_parts(module))


def shard_frozen(accelerator: Accelerator, module: nn.Module) -> None:
    """Divide the weights of a model that is only read (the reference), in place."""
    plugin = accelerator.state.fsdp_plugin
    free, precision = plugin.reshard_after_forward, plugin.mixed_precision_policy or MixedPrecisionPolicy()
    layers = getattr(module, "_no_split_modules", None) or ()
    for part in reversed(list(module.modules())):  # from the inside out
        if part is module or type(part).__name__ in layers:
            fully_shard(part, reshard_after_forward=free, mp_policy=precision)


def is_sharded(module: nn.Module) -> bool:
    """Whether any part of the module is divided among processes."""
    return bool(_parts(module))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold all weights of a sharded module in every process inside the ``with`` block, for passes without gradients.

    Each layer is gathered once, not once for each pass; inside, no pass waits for the other processes, so they may
    make different numbers of them (answers differ in length). Every process enters it.
    """
    parts = _parts(module)
    if not parts:
        yield
        return
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.reshard()
        _free_layers_after_forward(parts)


@contextmanager
def first_pass(module: nn.Module) -> Iterator[None]:
    """Run one pass of the whole of a module that was just sharded inside the ``with`` block.

    FSDP takes the first module that runs for the outermost one; without this pass that would be one inside it
    (``generate`` calls the policy alone). What the pass gathered is given up again.
    """
    with torch.no_grad():
        yield
    for part in _parts(module):
        part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or a sharded one put together (every process calls it)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module, *, keep: bool = True, names: set[str] | None = None) -> dict[str, Tensor]:
    """A module's ``state_dict`` with every sharded tensor put together on the CPU, one after the other.

    Every process calls it where the module is sharded; ``keep`` is False on those that only take part. ``names``: only these.
    Tied weights stay one tensor.
    """
    if not is_sharded(module) and not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return {
            name: tensor
            for name, tensor in module.state_dict().items()
            if isinstance(tensor, Tensor) and (names is None or name in names)
        }
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or (names is not None and name not in names):
            continue
        if id(tensor) not in seen:
            full = full_tensor(tensor.detach())
            seen[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            found[name] = seen[id(tensor)]
    return found


def divided_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Divide a whole tensor among the processes as ``example`` is, or hand it back where that is whole."""
    if not isinstance(example, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device, example.dtype), example.device_mesh, example.placements)


def full_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with every sharded tensor put together on the CPU (every process calls it)."""
    state = optimizer.state_dict()

    def put(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        found = value.full_tensor()
        return found.cpu() if keep else None

    entries = {index: {name: put(value) for name, value in one.items()} for index, one in state["state"].items()}
    return {**state, "state": entries}


def divided_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Divide the whole tensors of a stored optimizer state as the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def put(value: Any, parameter: Tensor) -> Any:
        fits = isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape
        return divided_like(value, parameter) if fits else value

    entries = {
        index: {name: put(value, parameters[index]) for name, value in one.items()} if index < len(parameters) else one
        for index, one in state["state"].items()
    }
    return {**state, "state": entries}


def unsharded(loaded: LoadedModel, model: ModelConfig, lora: LoraConfig, *, keep: bool) -> nn.Module | None:
    """The policy as a model of its own on the CPU, for saving; every process calls it where the policy is sharded.

    ``model`` and ``lora`` say how it was loaded; ``keep`` is False on processes that only take part, which get None. A policy
    that is not sharded is handed back.
    """
    if not is_sharded(loaded.model):
        return loaded.model
    weights = full_state(loaded.model, keep=keep)
    if not keep:
        return None
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if loaded.compute_dtype == torch.bfloat16 else "float32"
    fresh = load_model(dataclasses.replace(model, device="cpu", dtype=dtype), lora).model
    fresh.load_state_dict(weights)
    return fresh


def _parts(module: nn.Module) -> list[FSDPModule]:
    """The modules whose own weights are gathered as one piece: the layers, and what stands around them."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _free_layers_after_forward(parts: list[FSDPModule]) -> None:
    """Have layers give their gathered weights up after a forward, if accelerate's configuration says so.

    What stands around the layers (embedding, last norm, head) keeps its weights for the backward pass, which begins with
    it. It also must: they come back when the backward pass reaches the module's output, and a critic's logits are not used.
    """
    free = bool(AcceleratorState().fsdp_plugin.reshard_after_forward)
    for part in parts:
        is_layer = not any(isinstance(inner, FSDPModule) for inner in part.modules() if inner is not part)
        part.set_reshard_after_forward(free and is_layer, recurse=False)


def _wrap_layers(accelerator: Accelerator, module: nn.Module) -> None:
    """Tell accelerate what to divide as one piece: each transformer layer, and the model around them.

    The model itself is one, so that it can be held whole without what stands around it.
    """
    plugin = accelerator.state.fsdp_plugin
    models = [part for part in module.children() if getattr(part, "_no_split_modules", None)]
    names = {name for model in models for name in (*model._no_split_modules, type(model).__name__)}
    present = {type(part).__name__ for part in module.modules()}
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(names & present)
