"""Which layers and heads are read: from what a user writes to numbers."""

import re
from collections.abc import Mapping, Sequence

from cagsr.errors import ConfigError

HeadChoice = str | Sequence[int] | Mapping[int, Sequence[int]]


def parse_layers(layers: str | Sequence[int], available: Sequence[int]) -> tuple[int, ...]:
    """Find the layer numbers named by ``layers``, in the model's order; ConfigError where it can't be parsed or names
    others.

    ``"last-N"`` (all of them if there are fewer than N), ``"all"``, numbers separated by commas, or a list of numbers: the
    model's own (``layer_idx``, from 0); negative ones count from the last of ``available``, the readable layers, ascending.
    """
    if isinstance(layers, str):
        text = layers.strip()
        if text == "all":
            return tuple(available)
        if last := re.fullmatch(r"last-(\d+)", text):
            if (count := int(last[1])) < 1:
                raise ConfigError(f"attention.layers is {layers!r}, but at least one layer has to be read: use last-1.")
            return tuple(available[-count:])
    chosen = set()
    for number in _numbers(layers, "attention.layers", "last-N, all, or layer numbers separated by commas"):
        found = _resolve(number, available)
        if found is None:
            raise ConfigError(
                f"attention.layers names layer {number}, but attention can be read from {_span(available, 'layer')}."
            )
        chosen.add(found)
    return tuple(sorted(chosen))


def parse_heads(heads: HeadChoice, counts: Mapping[int, int]) -> dict[int, tuple[int, ...] | None]:
    """Find the heads to read in each chosen layer; None stands for all of them. ConfigError as ``parse_layers``.

    ``"all"``, numbers separated by commas or a list (the same in every layer), or a mapping from a layer to its list;
    negative numbers count from the last head. ``counts`` are the query heads of each chosen layer.
    """
    if isinstance(heads, str) and heads.strip() == "all":
        return dict.fromkeys(counts)
    if isinstance(heads, Mapping):
        if set(heads) != set(counts):
            raise ConfigError(
                f"attention.heads is given for layers {sorted(heads)}, but the layers read are {sorted(counts)}: give "
                f"heads for each of them."
            )
        return {layer: _layer_heads(heads[layer], layer, count) for layer, count in counts.items()}
    return {layer: _layer_heads(heads, layer, count) for layer, count in counts.items()}


def _layer_heads(heads: str | Sequence[int], layer: int, count: int) -> tuple[int, ...] | None:
    chosen = set()
    for number in _numbers(heads, "attention.heads", "all, or head numbers separated by commas"):
        found = _resolve(number, range(count))
        if found is None:
            raise ConfigError(
                f"attention.heads names head {number}, but layer {layer} has {_span(range(count), 'head')}."
            )
        chosen.add(found)
    return None if len(chosen) == count else tuple(sorted(chosen))


def _numbers(value: str | Sequence[int], key: str, allowed: str) -> list[int]:
    parts: Sequence[object] = value.split(",") if isinstance(value, str) else list(value)
    numbers = []
    for part in parts:
        if isinstance(part, str) and re.fullmatch(r"\s*-?\d+\s*", part):
            numbers.append(int(part))
        elif isinstance(part, int) and not isinstance(part, bool):
            numbers.append(part)
        else:
            raise ConfigError(f"{key} is {value!r}: write {allowed}.")
    if not numbers:
        raise ConfigError(f"{key} is empty: write {allowed}.")
    return numbers


def _resolve(number: int, available: Sequence[int]) -> int | None:
    if number >= 0:
        return number if number in available else None
    return available[number] if -number <= len(available) else None


def _span(numbers: Sequence[int], what: str) -> str:
    if len(numbers) == 1:
        return f"{what} {numbers[0]} alone"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    return f"{what}s {', '.join(map(str, numbers))}"
