"""The types that settings are declared with: each says what it allows, ``cagsr.config.validate`` holds them to it.

Every float must be finite as well.
"""

import os
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Interval
from pydantic import AfterValidator

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
Port = Annotated[int, Interval(ge=0, le=65535)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""NumPy takes no larger one."""
RunSeed = Annotated[int, Interval(ge=0, le=2**32 - 2**16)]
"""Of a run on several processes: each adds its number to it."""


def _can_be_written(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        raise ValueError("is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder {path.parent} can't be written; choose another one")
    return name


OutputFile = Annotated[str, AfterValidator(_can_be_written)]
"""Known to have a place before any work is done for it."""
