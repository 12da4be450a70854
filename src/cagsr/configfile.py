"""Configs as flat dotted keys and as YAML files, with the types checked. Needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cagsr.config import TrainConfig
from cagsr.errors import ConfigError


def leaf_types(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, type)`` for every setting of a nested config dataclass, in order."""
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaf_types(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Give ``{dotted key: value}`` for every setting of a config instance."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{field.name}."))
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def to_yaml(config: Any) -> str:
    """Write a config (a dataclass instance) as YAML that ``--config`` reads back to an equal config."""
    # Not allow_unicode: PyYAML writes U+0085 as it is, and reads it back as a line break.
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def read_config_file(path: Path, config_class: type[Any], left_out: list[str] | None = None) -> dict[str, Any]:
    """Give ``{dotted key: checked value}`` for what a YAML file sets.

    The config of a training run serves the other commands too (the same model, prompts and reward): settings that only
    training has are then left out, and their names appended to ``left_out``.

    Raises:
        ConfigError: a file that can't be read, malformed YAML (with the line), an unknown key (with the nearest right
            one), a value of the wrong type.
    """
    keys = dict(leaf_types(config_class))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; check the path after --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} can't be read ({error}); give a UTF-8 text file in YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"{path}{where}: not valid YAML ({problem}); correct that line") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: should hold 'key: value' lines, not a {type(tree).__name__}")
    groups = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    found: dict[str, Any] = {}
    training = dict(leaf_types(TrainConfig))
    elsewhere = set(training) | {key.rsplit(".", depth)[0] for key in training for depth in (1, 2)}
    skipped = _walk(tree, "", groups, keys, elsewhere, path, found)
    if left_out is not None:
        left_out.extend(skipped)
    return found


def _walk(
    tree: Mapping[Any, Any],
    prefix: str,
    groups: set[str],
    keys: Mapping[str, Any],
    elsewhere: set[str],
    path: Path,
    found: dict[str, Any],
) -> list[str]:
    """Collect a file's values under dotted keys; nested mappings and dotted keys may be mixed.

    Returns the keys of training (``elsewhere``) that this command doesn't have.
    """
    skipped: list[str] = []
    for name, value in tree.items():
        key = f"{prefix}{name}".replace("-", "_")
        if key in keys:
            found[key] = checked(keys[key], value, f"{path}: '{key}'")
        elif key not in groups:
            if key not in elsewhere:
                raise ConfigError(f"{path}: unknown key '{key}'{suggestion(key, [*groups, *keys])}")
            skipped.append(key)
        elif isinstance(value, dict):
            skipped += _walk(value, f"{key}.", groups, keys, elsewhere, path, found)
        elif value is not None:
            example = next(known for known in keys if known.startswith(f"{key}."))
            raise ConfigError(f"{path}: '{key}' is a group of settings (as '{example}'), not a single value")
    return skipped


def checked(kind: Any, value: Any, name: str) -> Any:
    """Convert ``value`` to the type ``kind`` or raise a ConfigError that names the key."""
    try:
        converted = _adapter(kind).validate_python(value)
    except ValidationError as error:
        problems = dict.fromkeys(problem["msg"].removeprefix("Input ") for problem in error.errors())
        raise ConfigError(f"{name} {' or '.join(problems)} (it is {value!r})") from None
    # pydantic takes true for 1 and "true" for text; in a file that is a slip.
    if isinstance(value, bool) and not isinstance(converted, bool):
        raise ConfigError(f"{name} should not be true or false (it is {value!r})")
    return converted


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True))


def suggestion(word: str, known: Sequence[str]) -> str:
    """Give ``; did you mean 'x'?`` for the known word nearest to ``word``, or an empty string."""
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    last = word.rpartition(".")[2]
    if last in by_last and word not in known:
        return f"; did you mean '{by_last[last]}'?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        near = [by_last[match] for match in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)]
    return f"; did you mean '{near[0]}'?" if near else ""


def _plain(value: Any) -> Any:
    """Turn tuples into lists, all the way down: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
