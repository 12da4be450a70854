"""Which metrics become curves, what they are called, and their points, thinned where there are very many."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cagsr.run_page.read_run import Run, is_number

MOST_POINTS = 45_000
"""Points on a page, over all curves of all runs: they take about 1 MB."""
FEWEST_POINTS = 60
"""Points that a curve keeps however many there are."""


@dataclass(frozen=True)
class Curve:
    """One chart: a metric over the steps, one line for each run."""

    key: str
    """Name in ``metrics.jsonl``, or in ``timings.jsonl`` for what is read from a clock."""
    title: str
    unit: str
    group: str
    """Heading on the page."""
    floor: float | None = None
    """The axis starts at 0 and reaches at least this, so that noise near 0 does not look like news."""


HELD_OUT, REWARD, POLICY, SPEED, MORE = "Held-out", "Reward", "Policy", "Speed", "More curves"
GROUPS = (HELD_OUT, REWARD, POLICY, SPEED, MORE)

NAMES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
_KNOWN = tuple(Curve(*row) for row in NAMES["curves"])


def curves_of(runs: Sequence[Run]) -> list[Curve]:
    """The charts that these runs have numbers for, in the order of the page."""
    present = {key for run in runs for row in run.rows for key in row if key != "step"}
    found = [curve for curve in _KNOWN if curve.key in present]
    others = present - {curve.key for curve in found}
    found += [_named(key) for key in sorted(others, key=lambda key: (not key.endswith("/mean"), key))]
    if "objective/raw_scores" not in present:
        reward = Curve("objective/scores", "Reward", "mean, before the KL penalty", REWARD)
        found = [reward if curve.key == reward.key else curve for curve in found]
    return sorted(found, key=lambda curve: GROUPS.index(curve.group))


def _named(key: str) -> Curve:
    """A chart for a key that the table does not know: a term's numbers, a held-out metric, anything else."""
    if key.startswith("rewards/") and key.count("/") >= 2:
        name, _, kind = key.removeprefix("rewards/").rpartition("/")
        term = name.replace("_", " ")
        if kind == "mean" and name != "total":
            return Curve(key, f"Term: {term}", "mean, raw", REWARD)
        units = {"std": "standard deviation", "share": "share of the reward's variance", "length_correlation": ""}
        title = f"{'Reward' if name == 'total' else term}: {kind.replace('_', ' ')}"
        return Curve(key, title, units.get(kind, kind), MORE, 1.0 if kind == "share" else None)
    if key.startswith("eval/"):
        return Curve(key, f"Held-out {key.removeprefix('eval/').replace('_', ' ')}", "", HELD_OUT)
    return Curve(key, key, "", MORE)


def points(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float | None]]:
    """A metric's steps and values; None where it was written but is no finite number."""
    written = [(row["step"], row[key]) for row in rows if key in row]
    known = [(step, value) for step, value in written if value is None or is_number(value) or isinstance(value, float)]
    values = [value if is_number(value) else None for _, value in known]
    return ([step for step, _ in known], values) if any(value is not None for value in values) else ([], [])


def smooth(values: Sequence[float | None]) -> list[float | None] | None:
    """Mean of each value and the ones around it, a twelfth of the curve wide, to six digits; None for a short curve."""
    half = len(values) // 12 // 2
    if half < 1:
        return None
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    there = ~np.isnan(numbers)
    window = np.ones(2 * half + 1)
    sums, counts = (np.convolve(one, window, "same") for one in (np.where(there, numbers, 0.0), there))
    means = zip(sums, counts, strict=True)
    return [float(f"{total / count:.6g}") if count else None for total, count in means]


def thin(values: Sequence[float | None], most: int) -> list[int]:
    """The places, rising, of the points to keep, at most ``most``: both ends, and each stretch's lowest and highest."""
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for number in range(stretches):
        here = range(number * count // stretches, (number + 1) * count // stretches)
        filled = [(value, place) for place in here if (value := values[place]) is not None]
        if filled:
            kept |= {min(filled)[1], max(filled)[1]}
    return sorted(kept)


def curve_data(runs: Sequence[Run], curves: Sequence[Curve]) -> tuple[dict[str, list[dict[str, Any]]], bool]:
    """The points of every chart, ready for JSON, and whether any were left out.

    Key -> one ``{"step", "value", "smooth", "marks"}`` for each run; ``marks`` are ``[step, sentence]`` of its warnings.
    """
    room = max(FEWEST_POINTS, MOST_POINTS // max(1, len(curves) * len(runs)))
    found: dict[str, list[dict[str, Any]]] = {}
    thinned = False
    for curve in curves:
        found[curve.key] = []
        for run in runs:
            steps, values = points(run.rows, curve.key)
            smoothed = smooth(values)
            kept = thin(values, room)
            thinned |= len(kept) < len(values)
            marks = [row for row in run.warnings if _belongs(row, curve.key)]
            found[curve.key].append(
                {
                    "step": [steps[place] for place in kept],
                    "value": [values[place] for place in kept],
                    "smooth": None if smoothed is None else [smoothed[place] for place in kept],
                    "marks": [[row["step"], f"step {row['step']}: {row.get('sentence', '')}"] for row in marks],
                }
            )
    return found, thinned


def _belongs(warning: Mapping[str, Any], key: str) -> bool:
    name = warning.get("name")
    if name == "dominance" and key.startswith("rewards/") and key.endswith("/share"):
        return True
    _, *watched = NAMES["monitors"].get(str(name), [""])
    return key in (watched or ("objective/raw_scores", "objective/scores"))
