"""From a command line and a YAML file to a typed config: flags override the file, the file overrides the defaults.

tyro turns the dataclasses of ``cagsr.config`` into flags and help, pydantic checks the types of what a file says. What
is added here: the file, a few short names, and one clear sentence for every mistake. Nothing here imports torch, so that
help and errors come at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro

from cagsr.configfile import checked, flatten, leaf_types, read_config_file, suggestion, to_yaml
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

    Raises:
        ConfigError: a file that can't be read, an unknown key or flag (with the nearest right one), a value of the
            wrong type, a required key that nobody gave.
        SystemExit: status 0, after ``--help`` was printed.
    """
    keys = dict(leaf_types(config_class))
    flags, files = _split_off_files(argv)
    flags = _plain_switches([_long_name(token, keys) for token in flags], keys)
    given: dict[str, Any] = {}
    for file in files:
        left_out: list[str] = []
        given.update(read_config_file(Path(file), config_class, left_out))
        if left_out:
            print(f"{file}: left out what only training has: {', '.join(left_out)}.", file=sys.stderr)
    default = _instance(config_class, given)

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config: ConfigT = tyro.cli(
                config_class, args=flags, default=default, prog=prog, description=description, use_underscores=True
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            print(_short_names(keys) + epilog)
            raise
        needed = [key for key in _required_keys(config_class) if key not in given]
        raise ConfigError(_explain(flags, keys, needed, printed.getvalue())) from None
    # A second look at the flags' values: constraints that annotated types state hold for flags as for files.
    for key, value in flatten(config).items():
        checked(keys[key], value, f"--{key}")
    return config


def from_yaml(config_class: type[ConfigT], path: Path) -> ConfigT:
    """Read a complete config file, as ``to_yaml`` writes it.

    Raises:
        ConfigError: as ``parse_command``.
    """
    return parse_command(config_class, ["--config", str(path)], prog=path.name)


def _instance(config_class: type[ConfigT], given: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Build a config from dotted keys; what nobody gave is the default or tyro's mark for a missing value."""
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _instance(hints[field.name], given, f"{key}.")
        elif key in given:
            values[field.name] = given[key]
        elif _required(field):
            values[field.name] = tyro.MISSING
    return config_class(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _split_off_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--config FILE`` and ``--config=FILE`` out of the command line."""
    flags: list[str] = []
    files: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            file = next(tokens, None)
            if file is None:
                raise ConfigError("--config needs the path of a YAML file after it")
            files.append(file)
        elif token.startswith("--config="):
            files.append(token.removeprefix("--config="))
        else:
            flags.append(token)
    return flags, files


def _long_name(token: str, keys: Mapping[str, Any]) -> str:
    """Replace a short flag by the dotted one it stands for."""
    key, equals, value = _flag(token)
    if key in ALIASES and key not in keys and ALIASES[key] in keys:
        return f"--{ALIASES[key]}{equals}{value}"
    return token


def _plain_switches(flags: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """Rewrite ``--run.resume True`` and ``--run.resume=false`` as tyro's ``--run.resume`` and ``--run.no_resume``."""
    plain: list[str] = []
    for token in flags:
        switch, equals, value = _flag(token)
        if equals and keys.get(switch) is bool and value.lower() in ("true", "false"):
            plain.append(f"--{switch}" if value.lower() == "true" else f"--{_negated(switch)}")
        elif plain and token.lower() in ("true", "false") and keys.get(_flag(plain[-1])[0]) is bool:
            if token.lower() == "false":
                plain[-1] = f"--{_negated(_flag(plain[-1])[0])}"
        else:
            plain.append(token)
    return plain


def _flag(token: str) -> tuple[str, str, str]:
    """Split ``--some-key=value`` into ``("some_key", "=", "value")``; the key is empty for what is no flag."""
    if not token.startswith("--"):
        return "", "", ""
    name, equals, value = token[2:].partition("=")
    return name.replace("-", "_"), equals, value


def _short_names(keys: Mapping[str, Any]) -> str:
    """Give the help's closing lines on short names and the config file."""
    short = [f"--{name} = --{key}" for name, key in ALIASES.items() if key in keys and name not in keys]
    listed = f"Short names: {', '.join(short)}.\n" if short else ""
    return f"{listed}--config FILE reads settings from a YAML file; flags override it.\n"


def _explain(flags: Sequence[str], keys: Mapping[str, Any], needed: Sequence[str], printed: str) -> str:
    """Say in one sentence why tyro refused the flags."""
    switches = {_negated(key): key for key, kind in keys.items() if kind is bool}
    values: dict[str, list[str]] = {}
    current: str | None = None
    for token in flags:
        key, equals, value = _flag(token)
        if key in keys or key in switches:
            current = key
            values[key] = [value] if equals else []
        elif key:
            names = [name for name, long in ALIASES.items() if long in keys]
            hint = suggestion(key, [*keys, *names]).replace("'", "'--", 1)
            return f"unknown flag --{key}{hint or '; --help lists them all'}"
        elif current is not None:
            values[current].append(token)
        else:
            return f"'{token}' is no flag; settings are given as --key value (--help lists them all)"
    for key, words in values.items():
        if key in switches or keys[key] is bool:
            if words:
                return (
                    f"--{key} is a switch and takes no value (it got {words[0]!r}); to turn it off: --{_negated(key)}"
                )
        elif problem := _bad_words(keys[key], key, words):
            return problem
    missing = [key for key in needed if key not in values]
    if missing:
        short = {long: name for name, long in ALIASES.items() if name not in keys}
        named = ", ".join(f"--{short.get(key, key)}" for key in missing)
        lack = "is missing; give it" if len(missing) == 1 else "are missing; give them"
        return f"{named} {lack} as a flag or in the --config file"
    return " ".join("".join(char for char in printed if char not in "│╭╮╰╯─").split())


def _negated(key: str) -> str:
    group, dot, name = key.rpartition(".")
    return f"{group}{dot}no_{name}"


def _bad_words(kind: Any, key: str, words: list[str]) -> str | None:
    """Say what is wrong with the words after a flag, None if nothing is."""
    name = f"--{key}"
    if not words:
        return None if get_origin(kind) is list else f"{name} needs a value after it"
    several: list[Any] = [words, *([words[0], None if words[0] == "None" else words[0]] if len(words) == 1 else [])]
    problem = ""
    for value in several:  # a list, one word, or None: any that fits will do
        try:
            checked(kind, value, name)
        except ConfigError as error:
            problem = str(error)
        else:
            return None
    if len(words) > 1 and _bad_words(kind, key, words[:1]) is None:
        return f"{name} takes one value (it got {', '.join(map(repr, words))})"
    return problem


def _required_keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that have no default."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _required_keys(hints[field.name], f"{prefix}{field.name}.")
        elif _required(field):
            yield f"{prefix}{field.name}"
