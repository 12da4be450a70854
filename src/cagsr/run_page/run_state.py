"""Where a run stands: waiting, running, finished or broken off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cagsr.runs.folder import LOGS, is_being_written

Kind = Literal["waiting", "running", "finished", "stopped"]


@dataclass(frozen=True)
class State:
    """What can be told of a run from outside."""

    kind: Kind
    sentence: str
    """The same for people, with the step."""
    written: float | None
    """When the last step was written, seconds since 1970; None before the first."""


def state_of(
    path: Path, metrics: Sequence[Mapping[str, Any]], warnings: Sequence[Mapping[str, Any]], steps: int | None
) -> State:
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
    if final and done is not None and (steps is None or done >= steps):
        return State("finished", f"Training is finished: {done} steps.", written)
    stops = [row for row in warnings if row.get("action") == "stop" and row["step"] == done]
    if stops:
        return State("stopped", f"A monitor stopped the training at step {done}{of} (see the warnings).", written)
    again = "cagsr train --config " + f"{path}/config.yaml --resume goes on."
    if not done:
        return State(
            "stopped", f"Training ended before its first step: it was killed, interrupted or failed; {again}", written
        )
    where = f"at step {done}{of}" if steps is None or done < steps else f"after step {done}, before the final model"
    return State("stopped", f"Training ended {where}: it was killed, interrupted or failed; {again}", written)
