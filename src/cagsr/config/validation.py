"""The one place that holds settings to their declared types and turns what is wrong into a sentence. Needs no torch."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cagsr.errors import ConfigError


def leaf_types(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, type)`` for every setting of a nested config dataclass, in order."""
    for name, kind in types_of(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from leaf_types(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def flatten(config: Any) -> dict[str, Any]:
    """Give ``{dotted key: value}`` for every setting of a config instance."""
    return {key: value for key, _, value in _settings(config)}


def validate(config: Any, prefix: str = "") -> None:
    """Refuse (ConfigError) settings that can't be used, before anything is loaded or written.

    Each is held to its declared type, then each section's ``conflicts()`` says what does not go together.
    """
    for key, kind, value in _settings(config, prefix):
        checked(kind, value, f"--{key}", strict=True)
    for sentence in _conflicts(config):
        raise ConfigError(sentence)


def checked(kind: Any, value: Any, name: str, *, strict: bool = False) -> Any:
    """Convert ``value`` to the type ``kind``; ``strict`` converts nothing, as for what Python code gave.

    Raises ConfigError, which begins with ``name``: it can't be, or is out of range.
    """
    try:
        converted = _adapter(kind).validate_python(value, strict=strict)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:
            if allowed := must_be(problem, bounds(kind)):
                raise ConfigError(f"{name} {problem['input']}: {allowed}.") from None
        texts = dict.fromkeys(problem["msg"].removeprefix("Input ") for problem in problems)
        raise ConfigError(f"{name} {' or '.join(texts)} (it is {value!r})") from None
    # pydantic takes true for 1 and "true" for text; in a file that is a slip.
    if isinstance(value, bool) and not isinstance(converted, bool):
        raise ConfigError(f"{name} should not be true or false (it is {value!r})")
    return converted


def bounds(kind: Any) -> dict[str, Any]:
    """The bounds that a type states, by their names in ``annotated_types`` (``gt``, ``ge``, ``lt``, ``le``)."""
    if get_origin(kind) is Annotated:
        names = ("gt", "ge", "lt", "le")
        return {name: at for one in kind.__metadata__ for name in names if (at := getattr(one, name, None)) is not None}
    return next(filter(None, map(bounds, get_args(kind))), {})


def must_be(problem: Any, bounds: Mapping[str, Any]) -> str:
    """Say of one of pydantic's errors what a value out of ``bounds`` must be; empty for one of another kind."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "finite_number":
        return "must be a finite number"
    if not problem["type"].startswith(("greater_than", "less_than")):
        return ""
    match bounds:
        case {"ge": low, "le": high}:
            return f"must lie between {low} and {high}"
        case {"ge": low, "lt": high}:
            return f"must be from {low} to below {high}"
        case {"gt": low, "le": high}:
            return f"must be above {low}, up to {high}"
        case {"gt": low}:
            return f"must be above {low}"
        case {"ge": low}:
            return f"must be {low} or more"
    return str(problem["msg"]).replace("Input should", "must")


def _settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(dotted key, type, value)`` for every setting of a config instance, in order."""
    for name, kind in types_of(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind, value


def _conflicts(section: Any) -> Iterator[str]:
    if hasattr(section, "conflicts"):
        yield from section.conflicts()
    for value in vars(section).values():
        if dataclasses.is_dataclass(value):
            yield from _conflicts(value)


def types_of(config_class: Any) -> dict[str, Any]:
    """Give ``{field: type}`` of a dataclass, with what is said about the types."""
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False))
