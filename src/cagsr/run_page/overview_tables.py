"""The page's tables: first and last numbers, warnings, costs, settings. Plain data for the template."""

from collections.abc import Mapping, Sequence
from typing import Any

from cagsr.config import DataConfig, ModelConfig, TrainConfig
from cagsr.config.validation import flatten
from cagsr.run_page.metric_curves import HELD_OUT, MORE, NAMES, SPEED, Curve, points
from cagsr.run_page.read_run import Run, is_number, step_seconds


def ends(run: Run, key: str) -> dict[str, float] | None:
    """A metric's first, last, lowest and highest value, with the first and last step; None where it has none."""
    filled = [(step, value) for step, value in zip(*points(run.rows, key), strict=True) if value is not None]
    if not filled:
        return None
    numbers = [value for _, value in filled]
    found = {"first": numbers[0], "last": numbers[-1], "lowest": min(numbers), "highest": max(numbers)}
    return found | {"first_step": filled[0][0], "last_step": filled[-1][0]}


def glance(runs: Sequence[Run], curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The rows of the first table: what matters, for each run."""
    return [
        {"curve": curve, "runs": [ends(run, curve.key) for run in runs]}
        for curve in curves
        if curve.group not in (MORE, SPEED)
        and not (curve.group == HELD_OUT and curve.key.endswith(("/ended", "/repetition")))
    ]


def warnings_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the monitors said, in the order of the steps."""
    found = [
        {
            "run": number,
            "label": run.label,
            "step": row["step"],
            "name": NAMES["monitors"].get(str(row.get("name")), [str(row.get("name", "")).replace("_", " ")])[0],
            "sentence": str(row.get("sentence", "")),
            "stop": row.get("action") == "stop",
        }
        for number, run in enumerate(runs)
        for row in run.warnings
    ]
    return sorted(found, key=lambda row: (row["step"], row["run"]))


def costs(run: Run) -> dict[str, Any] | None:
    """Seconds by part (what, key, seconds, share of the total), tokens sampled and their rates; None before the first timed step.

    ``sampling_per_second`` is of the part that samples and scores, ``memory`` the largest recorded peak in bytes.
    """
    if not run.timings:
        return None
    recorded = [(key, value) for row in run.timings for key, value in row.items() if is_number(value)]
    seconds: dict[str, float] = {}
    for key, value in recorded:
        if key.endswith("_seconds"):
            seconds[key] = seconds.get(key, 0.0) + value
    total = sum(step_seconds(row) for row in run.timings)
    tokens = sum(value for key, value in recorded if key == "response_tokens")
    memory = [value for key, value in recorded if "memory" in key and key.endswith("_bytes")]
    collecting = seconds.get("collect_seconds", 0.0)
    return {
        "parts": [(what, key, value, value / total if total else 0.0) for what, key, value in _parts(seconds)],
        "total": total,
        "steps": len(run.timings),
        "tokens": int(tokens),
        "per_second": tokens / total if total and tokens else None,
        "sampling_per_second": tokens / collecting if collecting and tokens else None,
        "memory": max(memory) if memory else None,
    }


def _parts(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """``(what, key, seconds)``: each phase, or what lies inside it and the rest of it."""
    found: list[tuple[str, str, float]] = []
    for phase, names in NAMES["phases"].items():
        if phase not in seconds:
            continue
        inside = [(what, key, seconds[key]) for key, what in names["inside"].items() if key in seconds]
        rest = seconds[phase] - sum(value for _, _, value in inside)
        found += [*inside, (f"{names['name']}: the rest" if inside else names["name"], phase, max(0.0, rest))]
    return found


def changed_settings(run: Run) -> list[tuple[str, str, str]]:
    """The settings that are not the default ones: dotted key, value, default (empty where there is none)."""
    defaults = flatten(TrainConfig(model=ModelConfig(path=""), data=DataConfig(path=""), output_dir=""))
    needed = ("model.path", "data.path", "output_dir")
    known = {key: _text(value) for key, value in defaults.items() if key not in needed}
    rows = [(key, _text(value), known.get(key, "")) for key, value in run.settings.items()]
    return [row for row in rows if row[0] not in known or row[1] != row[2]]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which several runs differ: dotted key and each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [_text(run.settings[key]) if key in run.settings else "—" for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "output_dir"]


def _text(value: Any) -> str:
    """A setting as a YAML file would say it; numbers that are equal look equal."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.10g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(one) for one in value)}]"
    return str(value)
