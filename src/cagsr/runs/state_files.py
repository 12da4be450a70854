"""State as files, exactly: module weights in safetensors, nested Python state (optimizer, RNG, counters) in JSON beside it.

safetensors holds nothing but tensors and JSON nothing but JSON; together they hold what a training run needs without
pickle, which would run code from the file when loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cagsr.errors import RunError
from cagsr.models.sharding import divided_like

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_PAIRS = "__pairs__"
_MARKS = (_TENSOR, _TUPLE, _PAIRS)


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors takes them, contiguous and each alone in its storage: copied only where they are not."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        as_it_is = alone and tensor.is_contiguous() and tensor.data_ptr() not in seen
        storable[name] = tensor.detach() if as_it_is else tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
    save_file(storable, path, metadata)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Empty and meta tensors all have address 0 and are no aliases of each other.
    if tensor.data_ptr() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def stored_names(module: nn.Module) -> set[str]:
    """Names of the parameters that need gradients, tied ones with all their names."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a module's whole weights by name as safetensors; tensors with several names (tied weights) are stored once."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        first = seen.setdefault(_identity(tensor), name)
        if first == name:
            kept[name] = tensor
        else:
            aliases[name] = first
    _write(kept, path, {"format": "pt", "aliases": json.dumps(aliases)})


def load_weights(module: nn.Module, path: Path, *, trainable_only: bool) -> None:
    """Load what ``save_weights`` wrote into a module in place. RunError: it has other parameters or shapes than the file."""
    with safe_open(path, framework="pt") as file:
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    weights = load_file(path)
    weights.update({alias: weights[first] for alias, first in aliases.items()})
    here = module.state_dict()
    weights = {name: divided_like(tensor, here[name]) if name in here else tensor for name, tensor in weights.items()}
    try:
        missing, unexpected = module.load_state_dict(weights, strict=not trainable_only)
    except RuntimeError as error:
        raise RunError(
            f"{path} doesn't fit the model ({str(error).splitlines()[-1].strip()}): resume with the model the run was "
            "started with."
        ) from error
    wrong = sorted(stored_names(module).intersection(missing)) + sorted(unexpected)
    if trainable_only and wrong:
        raise RunError(
            f"{path} doesn't fit the model's trainable parameters (first: {wrong[0]}): resume with the LoRA settings "
            "the run was started with."
        )


def save_tree(tree: Any, path: Path) -> None:
    """Write nested state as ``path`` + ``.json`` and, where it holds tensors, ``path`` + ``.safetensors``."""
    value, tensors = pack_tree(tree)
    path.with_name(path.name + ".json").write_text(json.dumps(value), encoding="utf-8")
    if tensors:
        _write(tensors, path.with_name(path.name + ".safetensors"))


def load_tree(path: Path) -> Any:
    """Read what ``save_tree`` wrote; tensors come on the CPU."""
    value = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    tensors_file = path.with_name(path.name + ".safetensors")
    return unpack_tree(value, load_file(tensors_file) if tensors_file.exists() else {})


def pack_tree(tree: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into a JSON value and its tensors by name, ``{"__tensor__": name}`` in their place.

    Floats, integers, strings, booleans and None are kept exactly (JSON writes the shortest text that reads back as
    the same float; NaN and infinities as Python's ``json`` does), tuples stay tuples and integer keys integers; TypeError for
    anything else. The tensors' names begin with ``name``, as in ``state.0.exp_avg``.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any, at: str) -> Any:
        # bool is an int; NumPy's float64 is a float but its float32 is not, so it ends in the TypeError below.
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            while at in tensors:  # {"a": {"b": x}, "a.b": y} would give both tensors one name
                at += "'"
            tensors[at] = value
            return {_TENSOR: at}
        if isinstance(value, tuple):
            return {_TUPLE: [pack(item, f"{at}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [pack(item, f"{at}.{i}") for i, item in enumerate(value)]
        if isinstance(value, dict):
            plain = all(isinstance(key, str) and key not in _MARKS for key in value)
            packed = [(key, pack(item, f"{at}.{key}")) for key, item in value.items()]
            return dict(packed) if plain else {_PAIRS: [[key, item] for key, item in packed]}
        raise TypeError(f"{at} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text and containers.")

    return pack(tree, name), tensors


def unpack_tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo ``pack_tree``."""
    if isinstance(value, list):
        return [unpack_tree(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(unpack_tree(item, tensors) for item in value[_TUPLE])
        if _PAIRS in value:
            return {key: unpack_tree(item, tensors) for key, item in value[_PAIRS]}
        return {key: unpack_tree(item, tensors) for key, item in value.items()}
    return value
