"""The plots of a report, as SVG text that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cagsr.compare.plan import START
from cagsr.compare.result_tables import GAINS, label_points
from cagsr.compare.results import GREEDY, MATCHED, Results
from cagsr.evaluation.intervals import paired_difference

# Okabe & Ito's colours, told apart by the colour-blind; each series has a marker of its own besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def gains_figure(results: Results, methods: Sequence[str], measure: str) -> str | None:
    """Each method's difference from its start, in three ways, with intervals."""
    shown = [name for name in methods if any(results.can_gain(name, how, measure) for how in GAINS)]
    if not shown:
        return None
    figure = Figure(figsize=(8, 1.8 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, (how, label) in enumerate(GAINS.items()):
        places, means, errors = [], [], []
        for row, name in enumerate(shown):
            if results.can_gain(name, how, measure):
                interval = paired_difference(*results.gain(name, how, measure))
                places.append(row + (number - 1) * 0.22)
                means.append(interval.mean)
                errors.append((interval.mean - interval.low, interval.high - interval.mean))
        axes.errorbar(
            means,
            places,
            xerr=np.array(errors).T,
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
    return _svg(figure)


def label_figure(results: Results, measure: str) -> str | None:
    """Quality against the number of human labels: people only, and the hybrid."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=False)
    drawn = False
    for axes, how in zip(panels, (GREEDY, MATCHED), strict=True):
        for number, (curve, label) in enumerate(
            (("human", "human preferences only"), ("hybrid", "hybrid with the self-reward"))
        ):
            points = label_points(results, curve, measure, how)
            if len(points) < 2:
                continue
            drawn = True
            labels = [labels for labels, _ in points]
            axes.plot(
                labels, [one.mean for _, one in points], marker=MARKERS[number], color=COLOURS[number], label=label
            )
            axes.fill_between(
                labels,
                [one.low for _, one in points],
                [one.high for _, one in points],
                color=COLOURS[number],
                alpha=0.15,
            )
        axes.axhline(0, color="#777777", linewidth=1)
        axes.set_xscale("symlog", linthresh=50)
        axes.set_xlabel("human labels (pairs)")
        axes.set_title("greedy" if how == GREEDY else "sampled, at matched entropy", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"difference in {measure} from the start")
    if not drawn:
        return None
    panels[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def training_figure(results: Results, methods: Sequence[str]) -> str | None:
    """Held-out metric, KL, entropy and length over training, mean over seeds."""
    series = (
        ("held_out", "held-out metric, sampled"),
        ("held_out_greedy", "held-out metric, greedy"),
        ("kl", "KL, nats a sequence"),
        ("entropy", "entropy, nats a token"),
        ("length", "length, tokens"),
    )
    shown = [name for name in methods if name != START and any(results.training(name))]
    if not shown:
        return None
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (key, label) in zip(panels, series, strict=False):
        for number, name in enumerate(shown):
            steps, values = _mean_curve(results.training(name), key)
            if steps:
                axes.plot(
                    steps,
                    values,
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)] if len(steps) < 15 else None,
                    linestyle="-" if number < len(COLOURS) else "--",
                    linewidth=1.2,
                    markersize=4,
                    label=results.plan.label(name),
                )
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].axis("off")
    panels[-1].legend(handles, labels, loc="center", frameon=False, fontsize=8)
    return _svg(figure)


def over_optimisation_figure(results: Results, methods: Sequence[str]) -> str | None:
    """The reward that is optimised against the held-out truth, along training: where they part, the reward is being gamed."""
    shown = [
        name
        for name in methods
        if name != START and any("reward" in row and "held_out" in row for run in results.training(name) for row in run)
    ]
    if not shown:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(shown):
        rewards, truths = [], []
        for run in results.training(name):
            own: list[float] = []
            for row in run:
                if "reward" in row:
                    own.append(row["reward"])
                if "held_out" in row:
                    # The reward of a step is noisy: the mean of the five before the evaluation.
                    rewards.append((row["step"], float(np.mean(own[-5:])) if own else 0.0))
                    truths.append((row["step"], row["held_out"]))
        steps = sorted({step for step, _ in rewards})
        x = [float(np.mean([value for step, value in rewards if step == at])) for at in steps]
        y = [float(np.mean([value for step, value in truths if step == at])) for at in steps]
        axes.plot(
            x,
            y,
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=results.plan.label(name),
        )
    axes.set_xlabel("reward, in standard deviations from the first step")
    axes.set_ylabel("held-out metric, sampled")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _mean_curve(runs: Sequence[Sequence[dict[str, float]]], key: str) -> tuple[list[float], list[float]]:
    found: dict[float, list[float]] = {}
    for run in runs:
        for row in run:
            if key in row:
                found.setdefault(row["step"], []).append(row[key])
    steps = sorted(found)
    return steps, [float(np.mean(found[step])) for step in steps]


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    # Neither date nor random ids: the same results give the same file. Text stays text: smaller, and it can be searched.
    with rc_context({"svg.hashsalt": "cagsr", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
