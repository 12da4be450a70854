"""``python -m benchmarks``: measure, print a table, say whether the bars hold."""

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

from benchmarks.capture import MEMORY_BAR, TIME_BAR, Measured, cases, measure_memory, measure_time, summarise

LABELS = {
    "plain": "plain sdpa",
    "last-4": "last 4 layers",
    "all": "all layers",
    "eager": "eager maps",
}


def main() -> int:
    """Run the benchmark; 0 if reading the last 4 layers stays below both bars everywhere, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Cost of reading the prompt attention.")
    parser.add_argument("--fast", action="store_true", help="the 30M model only, fewer rounds (about a minute)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    console = Console()
    results: list[Measured] = []
    for case in cases(arguments.fast):
        with console.status(f"{case.name}: memory") as status:
            memory = measure_memory(case, arguments.threads)
            status.update(f"{case.name}: time, {case.rounds} rounds")
            seconds = measure_time(case)
        results += summarise(case, seconds, memory)
        console.print(f"measured {case.name}")
    console.print(_table(results, arguments.threads))
    kept = _verdict(results, console)
    if arguments.json:
        _write(arguments.json, results, arguments.threads)
    return 0 if kept else 1


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


def _verdict(results: list[Measured], console: Console) -> bool:
    judged = [row for row in results if row.variant == "last-4"]
    time, memory = max(row.time_ratio for row in judged), max(row.memory_ratio for row in judged)
    kept = time <= TIME_BAR and memory <= MEMORY_BAR
    console.print(
        f"Last 4 layers, worst case: time {time:.2f} (bar {TIME_BAR:.2f}), memory {memory:.2f} (bar {MEMORY_BAR:.2f}): "
        f"{'the bars hold' if kept else 'a bar is broken'}."
    )
    return kept


def _write(path: Path, results: list[Measured], threads: int) -> None:
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "bars": {"time": TIME_BAR, "memory": MEMORY_BAR},
        "results": [asdict(row) for row in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
