"""Configs as YAML files. Needs no torch, but to tell a setting of training from a slip."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cagsr.config.validation import checked, leaf_types
from cagsr.errors import ConfigError


def to_yaml(config: Any) -> str:
    """Write a config (a dataclass instance) as YAML that ``--config`` reads back to an equal config."""
    # Not allow_unicode: PyYAML writes U+0085 as it is, and reads it back as a line break.
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists: YAML has none."""


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def read_config_file(path: Path, config_class: type[Any], left_out: list[str]) -> dict[str, Any]:
    """Give ``{dotted key: checked value}`` for what a YAML file sets.

    The config of a training run serves the other commands too (the same model, prompts and reward): settings that only
    training has are then left out, and their names appended to ``left_out``. Raises ConfigError as ``read_yaml``, and for an
    unknown key (with the nearest right one), a value of the wrong type or out of range.
    """
    keys = dict(leaf_types(config_class))
    groups = _groups(keys)
    found: dict[str, Any] = {}
    for key, value in _entries(read_yaml(path), groups):
        if key in keys:
            found[key] = checked(keys[key], value, f"{path}: '{key}'")
        elif key in groups:
            example = next(known for known in keys if known.startswith(f"{key}."))
            raise ConfigError(f"{path}: '{key}' is a group of settings (as '{example}'), not a single value")
        elif key not in _of_training():
            raise ConfigError(f"{path}: unknown key '{key}'{suggestion(key, [*groups, *keys])}")
        else:
            left_out.append(key)
    return found


@cache
def _of_training() -> frozenset[str]:
    """The keys and sections of a training run. Imported where they are asked for: its reward needs torch."""
    from cagsr.config import TrainConfig

    keys = [key for key, _ in leaf_types(TrainConfig)]
    return frozenset({*keys, *_groups(keys)})


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty one.

    Raises ConfigError: it can't be read, is malformed (with the line), or holds something else.
    """
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
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: should hold 'key: value' lines, not a {type(tree).__name__}")
    return tree or {}


def _groups(keys: Sequence[str] | Mapping[str, Any]) -> dict[str, None]:
    """The names of the sections that keys are in."""
    return dict.fromkeys(key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1))


def _entries(tree: Mapping[Any, Any], groups: Mapping[str, None], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a file's dotted keys with their values; nested mappings and dotted keys may be mixed."""
    for name, value in tree.items():
        key = f"{prefix}{name}".replace("-", "_")
        if key in groups and isinstance(value, dict | None):
            yield from _entries(value or {}, groups, f"{key}.")
        else:
            yield key, value


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
