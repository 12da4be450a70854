"""Nested Python state (optimizer, scheduler, RNG, counters) as JSON plus named tensors, exactly.

safetensors holds nothing but tensors and JSON nothing but JSON; together they hold what a training run needs without
pickle, which would run code from the file when loaded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_PAIRS = "__pairs__"
_MARKS = (_TENSOR, _TUPLE, _PAIRS)


def pack_tree(tree: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into a JSON value and the tensors in it.

    Floats, integers, strings, booleans and None are kept exactly (JSON writes the shortest text that reads back as
    the same float; NaN and infinities as Python's ``json`` does), tuples stay tuples and integer keys integers.

    Args:
        tree: the state; ``optimizer.state_dict()`` for example.
        name: what the tensors' names begin with, as in ``state.0.exp_avg``.

    Returns:
        The JSON value and the tensors by name, with a ``{"__tensor__": name}`` in the place of each.

    Raises:
        TypeError: the state holds an object that is neither of these.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any, at: str) -> Any:
        # bool is an int; NumPy's float64 is a float but its float32 is not, so it ends in the TypeError below.
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            while at in tensors:  # {"a": {"b": x}, "a.b": y} would give both tensors one name
                at += "'"
            tensors[at] = value.detach()
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
    """Undo ``pack_tree``.

    Raises:
        KeyError: a tensor named in ``value`` is not in ``tensors``.
    """
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
