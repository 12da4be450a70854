"""What a run folder says, read at one moment: finished, running or broken off alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cagsr.errors import RunError
from cagsr.run_page.run_state import State, state_of
from cagsr.run_page.step_times import with_speed
from cagsr.runs.folder import CONFIG
from cagsr.runs.lines import read_lines

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as far as it has come."""

    path: Path
    label: str
    """How the page calls it."""
    settings: Mapping[str, Any]
    """The nested settings of ``config.yaml``, empty before there is one."""
    config_text: str
    """The file as it stands."""
    metrics: tuple[Row, ...]
    """Rows of ``metrics.jsonl``; step 0 is the start's held-out evaluation."""
    rows: tuple[Row, ...]
    """The same with the speed of each step."""
    timings: tuple[Row, ...]
    samples: tuple[Row, ...]
    held_out: tuple[Row, ...]
    """Greedy answers to the same held-out prompts at each evaluation, where the run keeps them."""
    warnings: tuple[Row, ...]
    state: State

    def setting(self, key: str) -> Any:
        """A setting by its dotted key, None where the file has none."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def read_run(path: Path, label: str) -> Run:
    """Read a run folder. What a running training has written half of a line is left out.

    Raises:
        RunError: a file that can't be read; the sentence names it and the line.
    """
    settings, text = _config(path / CONFIG)
    metrics, timings = _rows(path / "metrics.jsonl"), _rows(path / "timings.jsonl")
    warnings = _rows(path / "warnings.jsonl")
    steps = settings.get("run", {}).get("steps") if isinstance(settings.get("run"), dict) else None
    return Run(
        path=path,
        label=label,
        settings=settings,
        config_text=text,
        metrics=metrics,
        rows=tuple(with_speed(metrics, timings)),
        timings=timings,
        samples=_rows(path / "samples.jsonl"),
        held_out=_rows(path / "held_out.jsonl"),
        warnings=warnings,
        state=state_of(path, metrics, warnings, steps if isinstance(steps, int) else None),
    )


def _config(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror}): make it readable.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark is not None else ""
        raise RunError(f"{path}{line} is not YAML that can be read: mend the file.") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path} holds no settings: put back the file that cagsr train wrote.")
    return settings, text


def _rows(path: Path) -> tuple[Row, ...]:
    """The whole rows of a log."""
    try:
        rows = read_lines(path)
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror}): make it readable.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise RunError(f"{path}, line {number} has no step: mend or remove that line.")
    return tuple(rows)
