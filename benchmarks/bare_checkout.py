"""Run from a checkout that nobody has installed: its ``src`` is imported, and what only checks settings may be missing."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
CHECKS_SETTINGS = ("annotated_types", "pydantic")
"""Settings are declared with their types and checked by them; what a benchmark sets itself needs no check."""


class _Stands:
    """Stands for a type of a package that is not there: it can be made, called and subscripted, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def validate_python(self, value: Any, **_: Any) -> Any:
        """As a setting's adapter would, but for looking at it."""
        return value


def is_there(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return find_spec(module) is not None


def prepare() -> list[str]:
    """Have this checkout's ``src`` imported, in this process and its children; gives sentences about stand-ins."""
    for folder in (str(ROOT), str(ROOT / "src")):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    before = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT / "src"), str(ROOT), *before]))
    missing = [name for name in CHECKS_SETTINGS if not is_there(name)]
    if not missing:
        return []
    for name in CHECKS_SETTINGS:
        module = ModuleType(name)
        module.__dict__["__getattr__"] = _stand_in
        sys.modules[name] = module
    return [f"{' and '.join(missing)} not installed: settings are taken as they are, unchecked."]


def _stand_in(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Stands, Exception), {})


def older_than_ours(packages: tuple[str, ...]) -> list[str]:
    """Sentences about packages that are another version than those we test with (``constraints.txt``), or not there."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    said = []
    for name in packages:
        try:
            here = version(name)
        except PackageNotFoundError:
            said.append(f"{name} is not installed (we test with {pinned[name]}).")
            continue
        if _minor(here) < _minor(pinned[name]):
            said.append(f"{name} {here} is older than {pinned[name]}, which we test with.")
    return said


def _minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
