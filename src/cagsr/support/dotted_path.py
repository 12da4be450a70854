"""What a dotted path names: a user's own functions and classes."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from cagsr.errors import ConfigError


def import_dotted(path: str, setting: str = "reward.functions") -> Any:
    """Import what a dotted path (``package.module.name``) names; modules in the current directory are found too.

    Raises ConfigError, which begins with the ``setting``: no dotted path, no such module or name, or it can't be imported.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not name or path.startswith("."):
        raise ConfigError(f"{setting}: {path!r} is not a dotted path; write package.module.function")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as python -m does: the command line's script directory hides it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{setting}: {path!r} names no module {error.name!r}, neither installed nor in {os.getcwd()}"
            ) from error
        raise ConfigError(f"{setting}: {module_name!r} imports {error.name!r}, which is not installed") from error
    except Exception as error:  # importing runs the user's code, which can raise anything
        raise ConfigError(
            f"{setting}: importing {module_name!r} failed with {type(error).__name__}: {error}; mend the module"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{setting}: module {module_name!r} ({module.__file__}) has no {name!r}")
    return getattr(module, name)


def import_function(path: str, setting: str) -> Callable[..., Any]:
    """As ``import_dotted``; raises ConfigError for what is no function too."""
    function = import_dotted(path, setting)
    if not callable(function):
        raise ConfigError(f"{setting} {path}: is {type(function).__name__}, not a function.")
    return function


def made_of_dotted(path: str, setting: str) -> Any:
    """The object that a dotted path names, or one of the class that it names, which needs no argument; else ConfigError."""
    found = import_dotted(path, setting)
    try:
        return found() if isinstance(found, type) else found
    except TypeError as error:
        raise ConfigError(f"--{setting} {path}: the class can't be made without arguments ({error}).") from error
