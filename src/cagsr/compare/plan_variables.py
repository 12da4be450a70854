"""Variables of a plan: what stands in its values as ``{name}`` and is given on the command line, a model's folder say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cagsr.errors import ConfigError
from cagsr.parse import suggestion

RESERVED = ("python", "work", "seed", "output")
"""Names that commands are filled in with."""


def with_variables(path: Path, tree: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The tree of a plan with its variables filled in; ``given`` are values for them, as ``NAME=VALUE``.

    Raises ConfigError for a value of another form, an unknown variable, and one without a value that is needed.
    """
    declared = tree.get("variables") or {}
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{path}: 'variables' must hold names with their values, as {{model: null}}.")
    for name in declared:
        if name in RESERVED:
            raise ConfigError(f"{path}: variables.{name}: commands are filled in with that name; choose another.")
    values = dict(declared)
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not value:
            raise ConfigError(f"--variables {one}: write NAME=VALUE.")
        if name not in declared:
            hint = suggestion(name, list(declared)) or f"; it has {', '.join(declared) or 'none'}"
            raise ConfigError(f"--variables {one}: {path} has no variable '{name}'{hint}")
        values[name] = value
    rest = {key: _filled(path, value, values) for key, value in tree.items() if key != "variables"}
    return rest | ({"variables": values} if declared else {})


def _filled(path: Path, value: Any, variables: Mapping[str, str | None]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(path, inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(path, inner, variables) for inner in value]
    if not isinstance(value, str):
        return value
    for name, given in variables.items():
        if value == f"{{{name}}}":
            return given
        if f"{{{name}}}" in value:
            if given is None:
                raise ConfigError(f"{path}: needs a value for '{name}'; give it as --variables {name}=VALUE.")
            value = value.replace(f"{{{name}}}", str(given))
    return value
