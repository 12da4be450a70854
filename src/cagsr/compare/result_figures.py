"""The plots of a report, as SVG text that needs nothing else."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cagsr.compare.jobs import GREEDY, MATCHED
from cagsr.compare.result_tables import GAINS, label_points
from cagsr.compare.results import Results
from cagsr.evaluation.intervals import paired_difference

# Okabe & Ito's colours, told apart by the colour-blind; each series has a marker of its own besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def gains_figure(results: Results, methods: Sequence[str], measure: str) -> str | None:
    """Each method's difference from its start, in three ways, with intervals."""
    found = {
        how: {
            name: paired_difference(*pair) for name in methods if (pair := results.pair(name, how, measure)) is not None
        }
        for how in GAINS
    }
    shown = [name for name in methods if any(name in own for own in found.values())]
    if not shown:
        return None
    figure = Figure(figsize=(8, 1.8 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, (how, label) in enumerate(GAINS.items()):
        own = found[how].values()
        axes.errorbar(
            [one.mean for one in own],
            [shown.index(name) + (number - 1) * 0.22 for name in found[how]],
            xerr=np.array([(one.mean - one.low, one.high - one.mean) for one in own]).T,
            fmt=MARKERS[number],
            color=COLOURS[number],
            label=label,
            capsize=2,
            markersize=5,
        )
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(shown)), [results.plan.label(name) for name in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"difference in {measure}, 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return as_svg(figure)


def label_figure(results: Results, measure: str) -> str | None:
    """Quality against the number of human labels: people only, and the hybrid."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = False
    curves = {"human": "human preferences only", "hybrid": "hybrid with the self-reward"}
    for axes, how in zip(panels, (GREEDY, MATCHED), strict=True):
        for colour, marker, (curve, label) in zip(COLOURS, MARKERS, curves.items(), strict=False):
            points = label_points(results, curve, measure, how)
            if len(points) < 2:
                continue
            drawn = True
            labels, own = zip(*points, strict=True)
            axes.plot(labels, [one.mean for one in own], marker=marker, color=colour, label=label)
            low, high = [one.low for one in own], [one.high for one in own]
            axes.fill_between(labels, low, high, color=colour, alpha=0.15)
        axes.axhline(0, color="#777777", linewidth=1)
        axes.set_xscale("symlog", linthresh=50)
        axes.set_xlabel("human labels (pairs)")
        axes.set_title("greedy" if how == GREEDY else "sampled, at matched entropy", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"difference in {measure} from the start")
    if not drawn:
        return None
    panels[0].legend(frameon=False, fontsize=8)
    return as_svg(figure)


def training_figure(results: Results, methods: Sequence[str]) -> str | None:
    """Held-out metric, KL, entropy and length over training, mean over seeds; of seven methods at most."""
    series = {
        "held_out": "held-out metric, sampled",
        "held_out_greedy": "held-out metric, greedy",
        "kl": "KL, nats a sequence",
        "entropy": "entropy, nats a token",
        "length": "length, tokens",
    }
    shown = [name for name in methods if any(results.training(name))]
    if not shown:
        return None
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (key, title) in zip(panels, series.items(), strict=False):
        for name, colour, marker in zip(shown, COLOURS, MARKERS, strict=False):
            steps, values = _mean_curve(results.training(name), key)
            if steps:
                style = {"linewidth": 1.2, "markersize": 4, "marker": marker if len(steps) < 15 else None}
                axes.plot(steps, values, color=colour, label=results.plan.label(name), **style)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].axis("off")
    panels[-1].legend(handles, labels, loc="center", frameon=False, fontsize=8)
    return as_svg(figure)


def over_optimisation_figure(results: Results, methods: Sequence[str]) -> str | None:
    """The reward that is optimised against the held-out truth: where they part, it is being gamed (seven methods at most)."""
    rows = {name: [row for run in results.training(name) for row in run] for name in methods}
    shown = [name for name in methods if any("reward" in row and "held_out" in row for row in rows[name])]
    if not shown:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour, marker in zip(shown, COLOURS, MARKERS, strict=False):
        runs = [_at_evaluations(run) for run in results.training(name)]
        rewards, truths = (_mean_curve(runs, key)[1] for key in ("reward", "held_out"))
        axes.plot(rewards, truths, marker=marker, color=colour, label=results.plan.label(name))
    axes.set_xlabel("reward, in standard deviations from the first step")
    axes.set_ylabel("held-out metric, sampled")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def _at_evaluations(run: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """A run's evaluations with their reward: that of one step is noisy, so the mean of the five before."""
    found = []
    rewards: list[float] = []
    for row in run:
        rewards += [row["reward"]] if "reward" in row else []
        if "held_out" in row:
            found.append(row | {"reward": float(np.mean(rewards[-5:])) if rewards else 0.0})
    return found


def _mean_curve(runs: Sequence[Sequence[dict[str, float]]], key: str) -> tuple[list[float], list[float]]:
    found: dict[float, list[float]] = {}
    for run in runs:
        for row in run:
            if key in row:
                found.setdefault(row["step"], []).append(row[key])
    steps = sorted(found)
    return steps, [float(np.mean(found[step])) for step in steps]


def as_svg(figure: Figure) -> str:
    """A figure as SVG text that needs nothing else."""
    stream = io.StringIO()
    # Neither date nor random ids: the same results give the same file. Text stays text: smaller, and it can be searched.
    with rc_context({"svg.hashsalt": "cagsr", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
