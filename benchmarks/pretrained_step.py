"""``python -m benchmarks.pretrained_step --model DIR --data prompts.jsonl``: a step of a pretrained model with LoRA against TRL's.

As ``benchmarks.ppo_step``, whose pair ``grpo`` this is: the same adapters, prompts, answers of one length, micro-batches and
reward on both sides, one epoch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.ppo_step import MEMORY_BAR, PAIRS, SPEED_BAR, as_json, compare, measure, ratio_table, steps_table
from benchmarks.workload import Work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if ours takes at least 1.5 times TRL's steps per second at no more memory, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrained_step", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a decoder-only model")
    parser.add_argument("--data", required=True, help="JSONL file with the column prompt")
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapters (default: 16; 0: all weights)")
    parser.add_argument("--prompts", type=int, default=6, help="prompts of a step (default: 6)")
    parser.add_argument("--generations", type=int, default=8, help="answers to each (default: 8)")
    parser.add_argument("--response", type=int, default=40, help="tokens of an answer (default: 40)")
    parser.add_argument("--micro_batch", type=int, default=16, help="sequences in scoring and update (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument(
        "--json", type=Path, default=report.RESULTS / "pretrained_step.json", help="where the numbers go"
    )
    options = parser.parse_args(arguments)
    if options.prompts * options.generations % options.micro_batch:
        parser.error(
            f"--micro_batch {options.micro_batch} must divide --prompts times --generations: TRL takes no part of one."
        )
    work = Work(
        f"{Path(options.model).name} {options.prompts}x{options.generations}x{options.response}, LoRA {options.lora}",
        prompts=options.prompts,
        generations=options.generations,
        response=options.response,
        micro_batch=options.micro_batch,
        epochs=1,
        start=options.model,
        data=options.data,
        lora=options.lora,
    )
    pair, console, before = PAIRS["grpo"], Console(width=120), report.load()
    with console.status(f"{work.name}: {options.rounds} rounds"):
        measured = measure(work, [pair.ours, pair.theirs], options.rounds, options.threads)
    ratio = compare(work.name, "grpo", measured[pair.ours.name], measured[pair.theirs.name])
    console.print(steps_table(work, measured, options.threads))
    console.print(ratio_table([ratio], {"grpo": pair}, options.rounds))
    console.print(f"Load of the machine: {before} before, {report.load()} after (this benchmark included).")
    found = {
        **report.machine(options.threads),
        "load": {"before": before, "after": report.load()},
        "bars": {"speed": SPEED_BAR, "memory": MEMORY_BAR},
        "ratio": asdict(ratio),
        "case": as_json(work, measured),
    }
    report.write_json(options.json, found)
    console.print(f"Written to {options.json}.")
    return 0 if ratio.speed >= SPEED_BAR and (ratio.memory or 0.0) <= MEMORY_BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
