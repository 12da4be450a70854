"""The time of each step, put beside its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

PHASES = ("collect_seconds", "update_seconds", "evaluation_seconds")
"""The phases of a step, which together are all of it."""
STEP_SECONDS, TOKENS_PER_SECOND = "step_seconds", "tokens_per_second"


def with_speed(metrics: Iterable[Mapping[str, Any]], timings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics with ``step_seconds`` and ``tokens_per_second`` added, where the step was timed."""
    timed = {row["step"]: row for row in timings}
    found = []
    for metric in metrics:
        row = dict(metric)
        timing = timed.get(row["step"])
        seconds = step_seconds(timing) if timing is not None else 0.0
        if timing is not None and seconds > 0:
            row[STEP_SECONDS] = seconds
            if is_number(timing.get("response_tokens")):
                row[TOKENS_PER_SECOND] = timing["response_tokens"] / seconds
        found.append(row)
    return found


def step_seconds(timing: Mapping[str, Any]) -> float:
    """All seconds of a step: of its three phases, whose parts are inside them."""
    return sum(timing[key] for key in PHASES if is_number(timing.get(key)))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (True and False are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
