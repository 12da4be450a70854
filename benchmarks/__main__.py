"""``python -m benchmarks``: every benchmark in turn; each measures, prints a table and says whether its bars hold."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import growth, long_prompts, ppo_step, processes
from benchmarks.capture import ALL_LAYERS_BAR, Case, Measured, cases, measure_memory, measure_time, summarise

LABELS = {
    "plain": "plain sdpa",
    "last-4": "last 4 layers",
    "all": "all layers",
    "eager": "eager maps",
}


NAMES = ("capture", "ppo_step", "growth", "long_prompts", "processes")
RESULTS = Path("benchmarks/results")


def main() -> int:
    """Run the benchmarks; 0 if all bars hold, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="capture: the cost of reading the prompt attention. ppo_step: a whole step against TRL's trainers. "
        "growth: how a step's cost grows. long_prompts: memory up to 32k tokens. processes: two against one. All but the first "
        "are modules too, with more options: python -m benchmarks.ppo_step.",
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="leave the others out")
    parser.add_argument("--fast", action="store_true", help="fewer and smaller cases, fewer rounds")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, help="also write capture's numbers to this file")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = True
    if "capture" in arguments.only:
        kept = _capture(arguments)
    fast, threads = ["--fast"] if arguments.fast else [], ["--threads", str(arguments.threads)]
    if "ppo_step" in arguments.only:
        kept = ppo_step.main([*fast, *threads]) == 0 and kept
    if "growth" in arguments.only:
        kept = growth.main(["--longest", "1024" if arguments.fast else "4096", *threads]) == 0 and kept
    if "long_prompts" in arguments.only:
        files = ["--json", str(RESULTS / "long_prompts.json"), "--plot", str(RESULTS / "long_prompts.png")]
        long_prompts.main(["--longest", "4096" if arguments.fast else "32768", *files, *threads])
    if "processes" in arguments.only:
        kept = processes.main([*fast, "--json", str(RESULTS / "processes.json")]) == 0 and kept
    return 0 if kept else 1


def _capture(arguments: argparse.Namespace) -> bool:
    """Reading the last 4 layers stays below both bars everywhere."""
    torch.set_num_threads(arguments.threads)

    console = Console()
    results: list[Measured] = []
    chosen = cases(arguments.fast)
    for case in chosen:
        with console.status(f"{case.name}: memory") as status:
            memory = measure_memory(case, arguments.threads)
            status.update(f"{case.name}: time, {case.rounds} rounds")
            seconds = measure_time(case)
        found = summarise(case, seconds, memory)
        results += found
        # Said at once: what has been measured is not lost when somebody stops it.
        ratios = "; ".join(
            f"{LABELS[row.variant]} {row.time_ratio:.2f} ({row.fastest_ratio:.2f}), memory {row.memory_ratio:.2f}"
            for row in found[1:]
        )
        console.print(f"{case.name}: {ratios}", soft_wrap=True)
    console.print(_table(results, arguments.threads))
    kept = _verdict(results, chosen, console)
    if arguments.json:
        _write(arguments.json, results, chosen, arguments.threads)
    return kept


def _table(results: list[Measured], threads: int) -> Table:
    table = Table(
        title=f"Cost of reading the prompt attention ({threads} CPU threads, float32)",
        caption="eager maps: output_attentions=True; time: median over rounds of the ratio to the same round's plain "
        "forward; fastest: fastest round to fastest; memory: peak above the idle model",
    )
    table.add_column("case", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for column in ("seconds", "time", "fastest", "MiB", "memory"):
        table.add_column(column, justify="right")
    previous = None
    for row in results:
        if previous not in (None, row.case):
            table.add_section()
        table.add_row(
            row.case if row.case != previous else "",
            LABELS[row.variant],
            f"{row.seconds:.3f}",
            f"{row.time_ratio:.2f}",
            f"{row.fastest_ratio:.2f}",
            f"{row.mebibytes:.0f}",
            f"{row.memory_ratio:.2f}",
        )
        previous = row.case
    return table


def _verdict(results: list[Measured], chosen: list[Case], console: Console) -> bool:
    bars = {case.name: case.bar for case in chosen}
    broken = []
    for row in results:
        # A neighbour on the machine slows single forwards: only what the median and the fastest both show is a cost.
        time = min(row.time_ratio, row.fastest_ratio)
        if row.variant == "last-4" and max(time, row.memory_ratio) > bars[row.case]:
            broken.append(
                f"{row.case}, last 4: time {time:.2f}, memory {row.memory_ratio:.2f}, bar {bars[row.case]:.2f}"
            )
        if row.variant == "all" and time > ALL_LAYERS_BAR:
            broken.append(f"{row.case}, all layers: time {time:.2f}, bar {ALL_LAYERS_BAR:.2f}")
    for line in broken:
        console.print(f"A bar is broken: {line}.")
    if not broken:
        console.print("The bars hold everywhere.")
    return not broken


def _write(path: Path, results: list[Measured], chosen: list[Case], threads: int) -> None:
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "bars": {"last-4": {case.name: case.bar for case in chosen}, "all": ALL_LAYERS_BAR},
        "results": [asdict(row) for row in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
