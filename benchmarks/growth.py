"""``python -m benchmarks.growth``: how the cost of our step grows with the size of the work, one size at a time.

Each point is a process of its own: a step that does not count, one or two that are timed, and one for the peak memory.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import memory, report
from benchmarks.turns import System
from benchmarks.workload import Work, save_start

STAGES = ("rollout", "scoring", "update")
SLOW = 20.0
"""Seconds of a step above which one timed step must do."""


@dataclass(frozen=True)
class Axis:
    """What grows, and the work at each size."""

    name: str
    unit: str
    works: list[tuple[int, Work]]
    """Size (for parameters it is counted when the model is made) and work."""


@dataclass(frozen=True)
class Point:
    """One size of one axis."""

    axis: str
    size: int
    seconds: float
    """Median of the timed steps."""
    stages: dict[str, float]
    tokens: int
    mebibytes: float | None
    """Peak above the idle model; None where the kernel can't tell."""
    work: Work


def axes(tiny: bool, longest: int) -> list[Axis]:
    """What is measured: ``tiny`` takes two small points an axis; ``longest`` is the longest prompt, tokens."""
    if tiny:
        base = Work("", "tiny", prompt=16, response=6, prompts=2, generations=2, micro_batch=2, epochs=1)
        prompts, responses, batches, layers, models = [16, 32], [6, 12], [2, 4], [1, 2], ["tiny"]
    else:
        base = Work("", "14M", prompt=256, response=64, prompts=2, generations=4, micro_batch=4, epochs=1)
        prompts = [256 * 2**power for power in range(8) if 256 * 2**power <= longest]
        responses, batches, layers = [32, 64, 128, 256], [1, 2, 4, 8], [1, 2, 4, 8]
        models = ["7M", "14M", "30M", "60M", "116M"]
    # One prompt and two answers in one pass, so that the longest still fit.
    long = replace(base, prompts=1, generations=2, response=base.response // 2, micro_batch=2)
    read = replace(base, model=base.model if tiny else "30M", prompts=1)
    return [
        Axis("prompt length", "tokens", [(size, replace(long, prompt=size)) for size in prompts]),
        Axis("response length", "tokens", [(size, replace(base, response=size)) for size in responses]),
        Axis("batch", "answers", [(base.generations * n, replace(base, prompts=n)) for n in batches]),
        Axis("layers read", "layers", [(size, replace(read, layers=f"last-{size}")) for size in layers]),
        Axis("parameters", "parameters", [(0, replace(base, model=name, prompts=1)) for name in models]),
    ]


def measure(axis: str, size: int, work: Work, threads: int) -> Point:
    """Time one point and take its peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_start(work, folder)
        with System("cagsr_ppo", work, folder, threads) as system:
            first = system.step()
            steps = [system.step() for _ in range(1 if first.seconds > SLOW else 2)]
            last = system.step(measure_memory=True) if memory.can_measure() else None
    peak = None if last is None or last.peak_mebibytes is None else last.peak_mebibytes - last.idle_mebibytes
    return Point(
        axis=axis,
        size=size or parameters,
        seconds=statistics.median(step.seconds for step in steps),
        stages={stage: statistics.median(step.stages[stage] for step in steps) for stage in STAGES},
        tokens=steps[0].tokens,
        mebibytes=peak,
        work=work,
    )


def exponent(points: Sequence[Point], value: str) -> float | None:
    """With which power of the size a value grows: the least-squares slope of its logarithm, None with too few points."""
    pairs = [(math.log(one.size), getattr(one, value)) for one in points]
    if len(pairs) < 2 or any(number is None or number <= 0 for _, number in pairs):
        return None
    sizes, numbers = [size for size, _ in pairs], [math.log(number) for _, number in pairs]
    return statistics.linear_regression(sizes, numbers).slope


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw time by stage and peak memory against each size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rc("svg", fonttype="none", hashsalt="cagsr")  # what tools.compact_svg reads
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, ScalarFormatter

    names = list(dict.fromkeys(point.axis for point in points))
    # One scale for all sizes: what hardly grows must look so.
    figure, rows = pyplot.subplots(
        2, len(names), figsize=(3.2 * len(names), 6), sharey="row", squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        found = [point for point in points if point.axis == name]
        sizes = [point.size for point in found]
        top, bottom = rows[0][column], rows[1][column]
        top.plot(sizes, [point.seconds for point in found], "k-o", label="whole step")
        for stage in STAGES:
            top.plot(sizes, [point.stages[stage] for point in found], "--", marker=".", label=stage)
        if all(point.mebibytes is not None for point in found):
            bottom.plot(sizes, [point.mebibytes for point in found], "k-o")
        for one in (top, bottom):
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.set_xticks(sizes, [_short(size) for size in sizes])
            one.minorticks_off()
            one.margins(y=0.3)
            one.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            one.yaxis.set_major_formatter(ScalarFormatter())
            one.grid(alpha=0.3)
        bottom.set_xlabel(name)
    rows[0][0].set_ylabel("seconds a step")
    rows[1][0].set_ylabel("peak above the idle model, MiB")
    rows[0][0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; always 0, since nothing is judged."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two points an axis: shows that it runs")
    parser.add_argument("--longest", type=int, default=4096, help="longest prompt, tokens (up to 32768)")
    parser.add_argument("--axes", nargs="+", metavar="NAME", help="only these, as 'prompt length' (default: all)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, default=report.RESULTS / "growth.json", help="where the numbers go")
    parser.add_argument("--figure", type=Path, default=report.RESULTS / "growth.png", help="where the plot goes")
    options = parser.parse_args(arguments)
    chosen = axes(options.tiny, options.longest)
    if options.axes:
        names = [axis.name for axis in chosen]
        if unknown := set(options.axes) - set(names):
            parser.error(f"--axes {', '.join(sorted(unknown))}: there are {', '.join(names)}.")
        chosen = [axis for axis in chosen if axis.name in options.axes]

    console = Console(width=120)
    before = report.load()
    points: list[Point] = []
    for axis in chosen:
        found = []
        for size, work in axis.works:
            with console.status(f"{axis.name}: {size or work.model}"):
                found.append(measure(axis.name, size, work, options.threads))
        console.print(_table(axis, found, options.threads))
        points += found
    plot(points, options.figure)
    console.print(f"Load of the machine: {before} before, {report.load()} after (this benchmark included).")
    exponents = {
        axis.name: {
            value: exponent([one for one in points if one.axis == axis.name], value)
            for value in ("seconds", "mebibytes")
        }
        for axis in chosen
    }
    report.write_json(
        options.json,
        {
            **report.machine(options.threads),
            "load": {"before": before, "after": report.load()},
            "exponents": exponents,
            "points": [asdict(point) for point in points],
        },
    )
    console.print(f"Written to {options.json} and {options.figure}.")
    return 0


def _table(axis: Axis, points: Sequence[Point], threads: int) -> Table:
    work = axis.works[0][1]
    slopes = [exponent(points, value) for value in ("seconds", "mebibytes")]
    said = ", ".join("?" if slope is None else f"size^{slope:.2f}" for slope in slopes)
    table = Table(
        title=f"{axis.name}: {work.model}, {work.prompts} prompts x {work.generations} answers, {work.prompt}+"
        f"{work.response} tokens where they don't grow ({threads} CPU threads)",
        caption=f"time and memory grow as {said} over these points",
    )
    for column in (axis.unit, "seconds", *STAGES, "tokens/s", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            f"{point.size:,}",
            f"{point.seconds:.2f}",
            *(f"{point.stages[stage]:.2f}" for stage in STAGES),
            f"{point.tokens / point.seconds:.1f}",
            "?" if point.mebibytes is None else f"{point.mebibytes:.0f}",
        )
    return table


def _short(size: int) -> str:
    if size >= 1_000_000:
        return f"{size / 1e6:.0f}M"
    return f"{size / 1024:.0f}k" if size >= 1024 else str(size)


if __name__ == "__main__":
    raise SystemExit(main())
