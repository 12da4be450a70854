"""Fit the forecast on the runs of ``examples.forecast.runs``, and hold it against runs that it has not seen.

    python -m examples.forecast.table --work runs/forecast --output forecast.json --markdown forecast.md

Every reward is forecast by a model that has seen none of its runs, under no leash and from no start. ``forecast.json`` is the
model fitted on all of them (:class:`cagsr.diagnosis.forecast.ForecastModel`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from cagsr.diagnosis.forecast import (
    FEATURES,
    PILOT,
    Forecast,
    ForecastModel,
    fit_forecast,
    pilot_features,
    turning_step,
)
from cagsr.errors import DataError
from cagsr.support.atomic import write_text_atomically

WITHIN = 0.3
"""A forecast is right that is off by at most this share of the true step."""


@dataclass(frozen=True)
class Options:
    """Fit and judge."""

    work: Path
    """The runs' folder."""
    output: Path | None = None
    """Where the model goes."""
    markdown: Path | None = None
    """Where the table goes."""
    drop: float = 0.08
    """A run has turned whose truth ends so far below its highest point."""
    truth: str = "eval/metric_greedy"
    """The metric that nobody was trained on."""
    ridge: float = 1.0
    """Of the model's weights."""
    generations: int = 8
    """Answers to a prompt in the runs."""


@dataclass(frozen=True)
class Run:
    """A run, its pilot and what came of it."""

    name: str
    reward: str
    features: dict[str, float]
    turned: float | None
    horizon: int
    start: float
    best: float
    end: float


def read_runs(options: Options) -> list[Run]:
    """The finished runs in a folder; DataError where there are none."""
    found = []
    for done in sorted(options.work.glob("*/done")):
        rows = [json.loads(line) for line in (done.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curve = [(row["step"], row[options.truth]) for row in rows if options.truth in row]
        steps, truth = [int(step) for step, _ in curve], [float(value) for _, value in curve]
        found.append(
            Run(
                done.parent.name,
                done.parent.name.rsplit("-", 3)[1],
                pilot_features([row for row in rows if row["step"] > 0], options.generations),
                turning_step(steps, truth, options.drop),
                steps[-1],
                truth[0],
                max(truth),
                truth[-1],
            )
        )
    if not found:
        raise DataError(f"{options.work}: no finished run there; make them with python -m examples.forecast.runs.")
    return found


def fitted(runs: Sequence[Run], ridge: float) -> ForecastModel:
    """The model of these runs."""
    turned, horizon = [one.turned for one in runs], [one.horizon for one in runs]
    return fit_forecast([one.features for one in runs], turned, horizon, ridge)


def forecasts(runs: Sequence[Run], ridge: float) -> list[Forecast]:
    """Each run's, by a model fitted on the runs of other rewards."""
    found: dict[str, Forecast] = {}
    for reward in {run.reward for run in runs}:
        others = [run for run in runs if run.reward != reward]
        model = fitted(others, ridge)
        found |= {run.name: model.predict(run.features, run.horizon) for run in runs if run.reward == reward}
    return [found[run.name] for run in runs]


def summary(runs: Sequence[Run], found: Sequence[Forecast]) -> str:
    """How good they are, in sentences."""
    pairs = list(zip(runs, found, strict=True))
    early = [one.step <= PILOT * (1 + WITHIN) for run, one in pairs if run.turned is not None and run.turned <= PILOT]
    later = [(run.turned, one) for run, one in pairs if run.turned is not None and run.turned > PILOT]
    alarms = [one.turns for run, one in pairs if run.turned is None]
    right = [abs(one.step - step) <= WITHIN * step for step, one in later]
    missed = [not one.turns for run, one in pairs if run.turned is not None]
    inside = [one.low <= step <= one.high for step, one in later]
    log_error = [abs(np.log(one.step / step)) for step, one in later]
    both = np.log([[max(run.turned, PILOT), max(one.step, PILOT)] for run, one in pairs if run.turned is not None])
    correlation = float(np.corrcoef(both.T)[0, 1]) if len(both) > 2 else float("nan")

    def share(values: Sequence[bool | np.bool_]) -> str:
        return f"{sum(map(bool, values))} of {len(values)}"

    return (
        f"{len(runs)} runs. {len(early)} turned within the first {PILOT} steps; the forecast says so (step "
        f"{PILOT * (1 + WITHIN):.0f} at the latest) of {share(early)}. {len(later)} turned later: it is within {WITHIN:.0%} of the "
        f"true step for {share(right)}, by a factor of {np.exp(np.median(log_error)) if later else np.nan:.2f} off in the middle, "
        f"and its 80 % interval holds {share(inside)}. Missed: {share(missed)} that turned. False alarms: {share(alarms)} that did "
        "not turn. Correlation of the logarithms of forecast and true step over those that turned, none taken for earlier than "
        f"{PILOT}: {correlation:+.2f}."
    )


def as_markdown(runs: Sequence[Run], found: Sequence[Forecast]) -> str:
    """One row for each run."""
    lines = [
        "| run | truth at the start, at best, at the end | turned at step | forecast [80 %] | chance to turn |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run, one in zip(runs, found, strict=True):
        turned = "–" if run.turned is None else f"{run.turned:.0f}"
        lines.append(
            f"| {run.name} | {run.start:.3f}, {run.best:.3f}, {run.end:.3f} | {turned} | {one.step:.0f} [{one.low:.0f}, "
            f"{one.high:.0f}] | {one.chance:.0%} |"
        )
    return "\n".join(lines)


def main(options: Options) -> None:
    """Fit, judge, write."""
    runs = read_runs(options)
    found = forecasts(runs, options.ridge)
    model = fitted(runs, options.ridge)
    text = f"{as_markdown(runs, found)}\n\n{summary(runs, found)}\n"
    print(text)
    order = sorted(zip(FEATURES, model.weights, strict=True), key=lambda one: -abs(one[1]))
    print(f"Pilot of {PILOT} steps; what hastens the turn (-) and delays it (+), in standard deviations: "
          + ", ".join(f"{name} {weight:+.2f}" for name, weight in order))  # fmt: skip
    if options.markdown is not None:
        write_text_atomically(options.markdown, text)
    if options.output is not None:
        write_text_atomically(options.output, json.dumps(model.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
