"""From a command line and a YAML file to a typed config, and back: flags override the file, the file the defaults.

Flags and files are two ways to write down dotted keys with values: both are converted and held to the settings' types by
``cagsr.config.validation``. tyro makes the help of the dataclasses. Nothing here imports torch, so that help and errors
come at once, but for settings with a reward, whose terms need it.
"""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import tyro
import yaml

from cagsr.config.validation import checked, flatten, leaf_types, types_of, validate
from cagsr.errors import ConfigError

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


def to_yaml(config: Any) -> str:
    """Write a config (a dataclass instance) as YAML that ``--config`` reads back to an equal config."""
    # Not allow_unicode: PyYAML writes U+0085 as it is, and reads it back as a line break.
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


def differing(config: Any, default: Any) -> dict[str, Any]:
    """The settings of a config that are not those of another one of its kind, section by section."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        usual = getattr(default, name)
        if value != usual:
            found[name] = differing(value, usual) if dataclasses.is_dataclass(value) else value
    return found


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
