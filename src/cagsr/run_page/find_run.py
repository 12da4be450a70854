"""Which folders are meant: a run, a quickstart around one, or something else that is said in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cagsr.errors import RunError
from cagsr.runs.folder import CONFIG, LOCK, LOGS

QUICKSTART = "quickstart.yaml"
"""Marks a quickstart's folder (``quickstart/stages.py``; importing that would take seconds)."""
_TRAINERS = ("sft", "dpo", "reward-model")
"""Commands on TRL's trainers, whose folders are models and keep no log of steps."""


def find_run(path: Path, *, wait: bool = False) -> Path:
    """Give the run folder that ``path`` means: itself, or ``run/`` inside a quickstart; with ``wait`` it need not be there yet.

    Raises RunError where it is no run; the sentence says what it is and what to give instead.
    """
    if path.is_file():
        raise RunError(f"{path} is a file: give the run's folder (the --output_dir of cagsr train).")
    if (path / QUICKSTART).is_file():
        return find_run(path / "run", wait=wait)
    if is_run(path):
        return path
    if not path.exists() or not any(path.iterdir()):
        if wait:
            return path
        what = "holds nothing yet" if path.exists() else "does not exist"
        raise RunError(f"{path} {what}: give the folder of a cagsr train run (--serve waits for one to begin).")
    for command in _TRAINERS:
        if (path / f"{command}.yaml").is_file():
            raise RunError(
                f"{path} is the folder of a cagsr {command}, which keeps no log of its steps: report shows runs of "
                "cagsr train (and of quickstart)."
            )
    if is_run(path.parent):
        raise RunError(f"{path} is a part of the run {path.parent}: give that folder.")
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and is_run(entry))
    if inside:
        named = ", ".join(map(str, inside[:3])) + (" ..." if len(inside) > 3 else "")
        raise RunError(f"{path} is no run but holds {len(inside)}: give one or several of them ({named}).")
    raise RunError(f"{path} is no run of cagsr train ({CONFIG} and {LOGS[0]} are not in it): give its --output_dir.")


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, begun or finished."""
    return (path / LOCK).is_file() or ((path / CONFIG).is_file() and (path / LOGS[0]).is_file())


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names that tell runs apart, folder names with the parents it takes; raises RunError where one is given twice."""
    parts = [path.resolve().parts for path in paths]
    for number, one in enumerate(parts):
        if one in parts[:number]:
            raise RunError(f"{paths[number]} is given twice: give each run once.")
    found = []
    for one in parts:
        rivals = [other for other in parts if other is not one]
        count = 1
        while any(other[-count:] == one[-count:] for other in rivals):
            count += 1
        found.append("/".join(one[-count:]))
    return found
