"""Run the parts one after the other, each within its time, and write JSON and Markdown after each."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bare_checkout import older_than_ours, prepare

LEAST = 10.0
"""Seconds below which a part is not begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all that could run did, else 1; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/gpu.json"), help="the table is beside it, as .md"
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts together (default: 7.5)")
    parser.add_argument("--only", nargs="+", help="tests, capture, sampling, step, lora: leave the others out")
    parser.add_argument(
        "--dry_run", action="store_true", help="tiny sizes on the CPU, to see that all runs; figures mean nothing"
    )
    given = parser.parse_args(arguments)
    began = time.monotonic()
    notes = prepare()
    from benchmarks.gpu.parts import PARTS, Result, command_of, rows_of, run_apart, run_here
    from benchmarks.gpu.setting import Setting

    if unknown := set(given.only or ()) - {part.name for part in PARTS}:
        parser.error(f"--only {' '.join(sorted(unknown))}: no such part.")
    setting = Setting(dry_run=given.dry_run)
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("There is no CUDA GPU here; --dry_run runs tiny sizes on the CPU.", file=sys.stderr)
        return 2
    notes += older_than_ours(("torch", "transformers", "accelerate", "peft", "trl"))
    if given.dry_run:
        notes.append("A dry run: tiny sizes on a CPU, whose figures mean nothing.")
    for note in notes:
        print(note, flush=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if given.only and part.name not in given.only:
                continue
            left = 60 * given.minutes - (time.monotonic() - began)
            file, result, started = Path(folder) / f"{part.name}.json", Result(part.name, part.title), time.monotonic()
            print(f"{part.title} (at most {min(part.seconds, max(0.0, left)):.0f} s) ...", flush=True)
            if missing := part.missing():
                result.state, result.reason = "left out", f"{', '.join(missing)} not installed"
            elif left < LEAST:
                result.state, result.reason = "left out", f"no time was left of --minutes {given.minutes:g}"
            elif given.dry_run:
                run_here(part, setting, file)
            else:
                result.state, result.reason = run_apart(command_of(part, setting, file), min(part.seconds, left))
            result.seconds, result.rows = time.monotonic() - started, rows_of(file)
            results.append(result)
            _write(given.json, notes, results, torch)
            made = f"{len(result.rows)} results" + (f", {result.state}: {result.reason}" if result.reason else "")
            print(f"  {made}, {result.seconds:.0f} s", flush=True)
    print(f"{given.json} and {given.json.with_suffix('.md')}: {time.monotonic() - began:.0f} s in all.", flush=True)
    failed = [row for result in results for row in result.rows if row["figures"].get("failed")]
    return int(bool(failed) or any(result.state in ("failed", "out of time") for result in results))


def _write(path: Path, notes: Sequence[str], results: Sequence[Any], torch: Any) -> None:
    """Both files whole, under temporary names first: what is finished is kept whatever comes after."""
    from benchmarks.gpu.result_table import markdown
    from benchmarks.report import write_json

    machine = _machine(torch)
    write_json(path, {"machine": machine, "notes": list(notes), "parts": [asdict(result) for result in results]})
    table = path.with_suffix(".md")
    temporary = table.with_suffix(".md.tmp")
    temporary.write_text(markdown(machine, notes, results), encoding="utf-8")
    os.replace(temporary, table)


def _machine(torch: Any) -> dict[str, Any]:
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {"on": about.name, "GiB": round(about.total_memory / 2**30), "CUDA": torch.version.cuda}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
