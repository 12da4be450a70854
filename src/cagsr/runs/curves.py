"""The picture of a run: reward and its terms, KL, length, repetition, entropy, the held-out metric."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from cagsr.errors import RunError
from cagsr.runs.lines import read_lines
from cagsr.support.atomic import write_bytes_atomically


@dataclass(frozen=True)
class _Panel:
    title: str
    metrics: Sequence[str]
    unit: str
    marks: bool = False
    floor: float | None = None


_PANELS = [_Panel(**one) for one in yaml.safe_load((files("cagsr.runs") / "curves.yaml").read_text(encoding="utf-8"))]
_Series = tuple[str, list[int], list[float]]
"""A label, steps, and values."""


def _series(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Pick a metric's steps and finite values."""
    points = [
        (row["step"], float(row[metric])) for row in rows if row.get(metric) is not None and math.isfinite(row[metric])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _draw(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str, marks: bool) -> None:
    """Draw a series: faint as it is and strong smoothed where it is long, with its points where it is sparse."""
    window = len(values) // 12
    if marks or window < 3:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if marks else None, markersize=4, label=label)
        return
    # The mean of each value and the ones around it, of fewer at the ends.
    around = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, [sum(some) / len(some) for some in around], color=colour, linewidth=1.8, label=label)


def _since_start(rows: Sequence[Mapping[str, Any]], key: str) -> _Series:
    """A term's mean since the first step, in standard deviations of that step: terms have units that differ a hundredfold."""
    steps, values = _series(rows, key)
    _, spreads = _series(rows, key.removesuffix("/mean") + "/std")
    unit = next((spread for spread in spreads if spread > 0), 1.0)
    first = values[0] if values else 0.0
    return key.split("/")[1], steps, [(value - first) / unit for value in values]


def plot_training_curves(metrics: Path, out: Path, title: str) -> Path:
    """Draw the curves of a run's ``metrics.jsonl`` as PNG to ``out``, and return that. Only panels with data are drawn.

    Raises RunError where there is nothing to draw.
    """
    picture = training_curves(read_lines(metrics), title)
    if picture is None:
        raise RunError(f"{metrics} holds no metrics to draw: let the run do at least one step.")
    write_bytes_atomically(out, picture)
    return out


def training_curves(rows: Sequence[Mapping[str, Any]], title: str) -> bytes | None:
    """The curves of rows of metrics as PNG; None where there is nothing to draw."""
    terms = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    term_series = [_since_start(rows, key) for key in terms if key != "rewards/total/mean"]
    drawn: list[tuple[_Panel, list[_Series]]] = []
    for panel in _PANELS:
        found: list[_Series] = [("", *_series(rows, name)) for name in panel.metrics] if panel.metrics else term_series
        found = [one for one in found if one[1]]
        if found:
            drawn.append((panel, found[:1] if panel.metrics else found))
    if not drawn:
        return None
    with rc_context(fname=str(files("cagsr.runs") / "curves.mplstyle")):
        return _png(drawn, title)


def _png(drawn: Sequence[tuple[_Panel, list[_Series]]], title: str) -> bytes:
    columns = min(len(drawn), 4 if len(drawn) > 6 else 3)
    lines = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.9 * lines + 0.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (panel, series) in zip(grid, drawn, strict=False):
        for number, (label, steps, values) in enumerate(series):
            _draw(axes, steps, values, f"C{number}", label, panel.marks)
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if len(series) > 1 or series[0][0]:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + (high - low) * 0.1 * (len(series) + 1))  # room for the legend above the curves
            axes.legend()
        if panel.floor is not None:
            axes.set_ylim(0, max(panel.floor, axes.get_ylim()[1]))
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi="figure")
    return stream.getvalue()
