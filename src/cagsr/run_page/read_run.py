"""Which run folder is meant, and what it says, read at one moment: finished, running or broken off alike."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cagsr.errors import RunError
from cagsr.runs.folder import CONFIG, LOCK, LOGS, flat_tree, is_being_written
from cagsr.runs.lines import read_lines

Row = dict[str, Any]
PHASES = ("collect_seconds", "update_seconds", "evaluation_seconds")
"""The phases of a step, which together are all of it."""
QUICKSTART = "quickstart.yaml"
"""Marks a quickstart's folder (``quickstart/stages.py``; importing that would take seconds)."""
_TRAINERS = ("sft", "dpo", "reward-model")
"""Commands on TRL's trainers, whose folders are models and keep no log of steps."""


@dataclass(frozen=True)
class State:
    """What can be told of a run from outside."""

    kind: Literal["waiting", "running", "finished", "stopped"]
    sentence: str
    """The same for people, with the step."""
    written: float | None
    """When the last step was written, seconds since 1970; None before the first."""


@dataclass(frozen=True)
class Run:
    """One run as far as it has come."""

    path: Path
    label: str
    """How the page calls it."""
    settings: Mapping[str, Any]
    """Those of ``config.yaml`` by their dotted names, empty before there is one."""
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


def read_run(path: Path, label: str) -> Run:
    """Read a run folder. What a running training has written half of a line is left out.

    Raises RunError for a file that can't be read; the sentence names it and the line.
    """
    settings, text = _config(path / CONFIG)
    logs = ("metrics", "timings", "warnings", "samples", "held_out")
    metrics, timings, warnings, samples, held_out = (_rows(path / f"{name}.jsonl") for name in logs)
    steps = settings.get("run.steps")
    return Run(
        path=path,
        label=label,
        settings=settings,
        config_text=text,
        metrics=metrics,
        rows=tuple(_with_speed(metrics, timings)),
        timings=timings,
        samples=samples,
        held_out=held_out,
        warnings=warnings,
        state=_state(path, metrics, warnings, steps if isinstance(steps, int) else None),
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
    return flat_tree(settings) if settings else {}, text


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


def _with_speed(metrics: Iterable[Row], timings: Iterable[Row]) -> Iterable[Row]:
    """Rows of metrics with ``step_seconds`` and ``tokens_per_second`` added, where the step was timed."""
    timed = {row["step"]: row for row in timings}
    for row in metrics:
        timing = timed.get(row["step"], {})
        seconds = step_seconds(timing)
        speed = {} if seconds <= 0 else {"step_seconds": seconds}
        if speed and is_number(timing.get("response_tokens")):
            speed["tokens_per_second"] = timing["response_tokens"] / seconds
        yield row | speed


def step_seconds(timing: Mapping[str, Any]) -> float:
    """All seconds of a step: of its three phases, whose parts are inside them."""
    return sum(timing[key] for key in PHASES if is_number(timing.get(key)))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (True and False are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _state(path: Path, metrics: Sequence[Row], warnings: Sequence[Row], steps: int | None) -> State:
    """Tell a run's state from its lock, which the kernel frees however a process ends, and from what it has written.

    ``steps`` is how many the run is to do, None if that is not known.
    """
    done = int(metrics[-1]["step"]) if metrics else None
    log = path / LOGS[0]
    written = log.stat().st_mtime if done is not None and log.exists() else None
    of = f" of {steps}" if steps is not None else ""
    if is_being_written(path):
        if not done:
            what = "the first step is not done yet" if done == 0 else "it is getting ready for the first step"
            return State("waiting", f"Training has begun; {what}.", written)
        if steps is not None and done >= steps:
            return State("running", f"All {steps} steps are done; the final model is being written.", written)
        return State("running", f"Training goes on: step {done}{of} is done.", written)
    if not path.exists() or not any(path.iterdir()):
        return State("waiting", "Training has not begun: there is nothing in this folder yet.", None)
    final = (path / "final" / "config.json").is_file()
    ended = any(row.get("action") == "end" and row["step"] == done for row in warnings)
    if final and done is not None and (steps is None or done >= steps or ended):
        early = f"{of}, as the forecast asked for" if ended else " steps"
        return State("finished", f"Training is finished: {done}{early}.", written)
    if any(row.get("action") == "stop" and row["step"] == done for row in warnings):
        return State("stopped", f"A monitor stopped the training at step {done}{of} (see the warnings).", written)
    where = (
        f"at step {done}{of}" if steps is None or (done or 0) < steps else f"after step {done}, before the final model"
    )
    killed = f"Training ended {where if done else 'before its first step'}: it was killed, interrupted or failed;"
    return State("stopped", f"{killed} cagsr train --config {path}/config.yaml --resume goes on.", written)
