"""From a command line and a YAML file to a typed config: flags override the file, the file overrides the defaults.

Flags and files are two ways to write down dotted keys with values: both are converted and held to the settings' types by
``cagsr.config.validation``. tyro makes the help of the dataclasses. Nothing here imports torch, so that help and errors
come at once, but for settings with a reward, whose terms need it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import tyro

from cagsr.config.validation import checked, flatten, leaf_types, types_of, validate
from cagsr.configfile import read_config_file, suggestion, to_yaml
from cagsr.errors import ConfigError

__all__ = ["ALIASES", "flatten", "from_yaml", "parse_command", "to_yaml"]

ConfigT = TypeVar("ConfigT")

ALIASES = {
    "model": "model.path",
    "data": "data.path",
    "steps": "run.steps",
    "seed": "run.seed",
    "resume": "run.resume",
    "overwrite": "run.overwrite",
    "profile": "run.profile",
    "lora_r": "lora.r",
    "num_generations": "sampling.num_generations",
    "max_new_tokens": "sampling.max_new_tokens",
}
"""Short names of the most used flags, where a command has the key they stand for."""


def parse_command(
    config_class: type[ConfigT], argv: Sequence[str], prog: str, description: str = "", epilog: str = ""
) -> ConfigT:
    """Read the flags in ``argv`` and the files they name with ``--config`` into a ``config_class``.

    Keys are written with dots (``--reward.coverage.weight 2``), with underscores or hyphens. A required key may come
    from the file or from a flag.

    Raises ConfigError for a file that can't be read, an unknown key or flag (with the nearest right one), a value of the
    wrong type or out of range, settings that contradict each other, a required key that nobody gave; SystemExit after --help.
    """
    keys = dict(leaf_types(config_class))
    short = {name: key for name, key in ALIASES.items() if key in keys and name not in keys}
    help_wanted = not {"-h", "--help"}.isdisjoint(argv)
    files, flags = _read_words([word for word in argv if word not in ("-h", "--help")], keys, short)
    given: dict[str, Any] = {}
    for file in files:
        left_out: list[str] = []
        given |= read_config_file(Path(file), config_class, left_out)
        if left_out:
            print(f"{file}: left out what only training has: {', '.join(left_out)}.", file=sys.stderr)
    given |= flags
    config = _instance(config_class, given)
    if help_wanted:
        try:
            tyro.cli(
                config_class, args=["--help"], default=config, prog=prog, description=description, use_underscores=True
            )
        finally:
            names = ", ".join(f"--{name} = --{key}" for name, key in short.items())
            listed = f"Short names: {names}.\n" if short else ""
            print(f"{listed}--config FILE reads settings from a YAML file; flags override it.\n{epilog}")
    missing = [key for key, value in flatten(config).items() if value is tyro.MISSING]
    if missing:
        shorter = {key: name for name, key in short.items()}
        lack = "is missing; give it" if len(missing) == 1 else "are missing; give them"
        named = ", ".join(f"--{shorter.get(key, key)}" for key in missing)
        raise ConfigError(f"{named} {lack} as a flag or in the --config file")
    validate(config)
    return config


def from_yaml(config_class: type[ConfigT], path: Path) -> ConfigT:
    """Read a complete config file, as ``to_yaml`` writes it; raises as ``parse_command``."""
    return parse_command(config_class, ["--config", str(path)], prog=path.name)


def _instance(config_class: type[ConfigT], given: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Build a config from dotted keys; what nobody gave is the default or tyro's mark for a missing value."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        key, kind = f"{prefix}{field.name}", types_of(config_class)[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = _instance(kind, given, f"{key}.")  # type: ignore[arg-type]
        elif key in given:
            values[field.name] = given[key]
        elif field.default is field.default_factory is dataclasses.MISSING:
            values[field.name] = tyro.MISSING
    return config_class(**values)


def _read_words(
    words: Sequence[str], keys: Mapping[str, Any], short: Mapping[str, str]
) -> tuple[list[str], dict[str, Any]]:
    """Read a command line: the files of ``--config``, and ``{dotted key: checked value}`` for all other flags."""
    switches = {_negated(key): key for key, kind in keys.items() if kind is bool}
    known = {*keys, *switches, "config"}
    found: list[tuple[str, list[str]]] = []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if word.startswith("--"):
            key = key if key in known else short.get(key, key)
            if key not in known:
                hint = suggestion(key, [*keys, *short]).replace("'", "'--", 1)
                raise ConfigError(f"unknown flag --{key}{hint or '; --help lists them all'}")
            found.append((key, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"'{word}' is no flag; settings are given as --key value (--help lists them all)")
    files: list[str] = []
    given: dict[str, Any] = {}
    for key, values in found:
        if key == "config":
            if len(values) != 1:
                raise ConfigError("--config needs the path of a YAML file after it")
            files += values
        elif key in switches:
            given[switches[key]] = not _switched(key, values, switches[key])
        elif keys[key] is bool:
            given[key] = _switched(key, values, _negated(key))
        else:
            given[key] = _value(keys[key], values, f"--{key}")
    return files, given


def _switched(key: str, values: list[str], opposite: str) -> bool:
    """Whether a switch was set: alone, or with True or False after it."""
    if (values and values[0].lower() not in ("true", "false")) or len(values) > 1:
        raise ConfigError(
            f"--{key} is a switch and takes no value (it got {values[0]!r}); to turn it off: --{opposite}"
        )
    return not values or values[0].lower() == "true"


def _value(kind: Any, words: list[str], name: str) -> Any:
    """Convert the words after a flag."""
    kinds = (kind, *get_args(kind))
    if words == ["None"] and NoneType in kinds:
        return None
    if any(get_origin(one) in (list, tuple) for one in kinds):
        return checked(kind, words, name)
    if not words:
        raise ConfigError(f"{name} needs a value after it")
    value = checked(kind, words[0], name)
    if len(words) > 1:
        raise ConfigError(f"{name} takes one value (it got {', '.join(map(repr, words))})")
    return value


def _negated(key: str) -> str:
    group, dot, name = key.rpartition(".")
    return f"{group}{dot}no_{name}"
