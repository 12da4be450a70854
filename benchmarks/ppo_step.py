"""``python -m benchmarks.ppo_step``: a whole step (rollout, scoring, update) of ours against TRL's trainers.

Every system starts from the same model and does the same work on the same prompts, in float32, with gradient
checkpointing off. They take steps in turn, the order turned round from round to round; the figure is the median over
rounds of the ratio of steps per second in the same round, which is that of tokens per second where all answers have full
length. Where they end at random each system draws its own, and a step's time is compared, not the luck of its tokens. Then
each takes one step more for its peak memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import memory, report
from benchmarks.systems import trl_ppo
from benchmarks.turns import Step, System
from benchmarks.workload import Work, save_start

SPEED_BAR, MEMORY_BAR = 1.5, 1.0
"""Ours against TRL's ``PPOTrainer``: at least so many times its steps per second, at most so much of its memory."""
STAGES = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class Contestant:
    """One system and how it is set up."""

    name: str
    module: str
    options: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """Two systems that do the same work."""

    ours: Contestant
    theirs: Contestant


PAIRS = {
    "ppo": Pair(
        Contestant("cagsr PPO", "cagsr_ppo", {"estimator": "gae", "critic": "head"}),
        Contestant("TRL PPO", "trl_ppo", {"value": "shared"}),
    ),
    "grpo": Pair(
        Contestant("cagsr GRPO", "cagsr_ppo", {"estimator": "grpo"}),
        Contestant("TRL GRPO", "trl_grpo", {}),
    ),
    "critic": Pair(
        Contestant("cagsr PPO, critic", "cagsr_ppo", {"estimator": "gae", "critic": "model"}),
        Contestant("TRL PPO, critic", "trl_ppo", {"value": "separate"}),
    ),
}


@dataclass(frozen=True)
class Measured:
    """One system's steps of one case."""

    name: str
    steps: list[Step]
    memory: Step | None
    """The step that was measured for memory; None where the kernel can't."""

    def speed(self) -> list[float]:
        """Steps per second, round by round."""
        return [1 / step.seconds for step in self.steps]

    def cpu_speed(self) -> list[float]:
        """Steps per second of processor time, round by round."""
        return [1 / step.cpu_seconds for step in self.steps]

    def stage(self, name: str) -> float:
        """Median seconds of a stage."""
        return statistics.median(step.stages[name] for step in self.steps)

    def peak(self) -> float | None:
        """Highest resident size of a step above the idle model, MiB."""
        if self.memory is None or self.memory.peak_mebibytes is None:
            return None
        return self.memory.peak_mebibytes - self.memory.idle_mebibytes


@dataclass(frozen=True)
class Ratio:
    """Ours against theirs in one case."""

    case: str
    pair: str
    speed: float
    """Median over the rounds of the ratio of steps per second in the same round: of tokens per second with equal tokens."""
    slowest: float
    """The smallest of these ratios."""
    fastest: float
    """The largest."""
    cpu_speed: float
    """As ``speed``, per second of processor time: what is left to compare on a machine that others use."""
    memory: float | None
    """Peaks above the idle model."""


def cases(size: str, vocabulary: int | None = None) -> list[Work]:
    """The cases of a run: ``tiny`` (seconds, for the test), ``fast`` or ``full``; ``vocabulary`` pieces, one case."""
    base = {
        "tiny": Work("", "tiny", prompt=24, response=10, prompts=2, generations=4, micro_batch=4, epochs=2),
        "fast": Work("", "30M", prompt=64, response=32, prompts=2, generations=4, micro_batch=4, epochs=2),
        "full": Work("", "30M"),
    }[size]
    sizes = f"{base.model} {base.prompts}x{base.generations}x({base.prompt}+{base.response})"
    if vocabulary is not None:
        return [replace(base, name=f"{sizes} vocabulary {vocabulary:,}", vocabulary=vocabulary)]
    full = replace(base, name=f"{sizes} all full length")
    return [full, replace(full, name=f"{sizes} varied lengths", varied=True)]


def measure(work: Work, contestants: Sequence[Contestant], rounds: int, threads: int) -> dict[str, Measured]:
    """Let the systems step in turn, after one round that does not count."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_start(work, folder)
        systems = {
            one.name: stack.enter_context(System(one.module, work, folder, threads, **one.options))
            for one in contestants
        }
        for system in systems.values():
            system.step()
        steps: dict[str, list[Step]] = {name: [] for name in systems}
        order = list(systems)
        for _ in range(rounds):
            for name in order:
                steps[name].append(systems[name].step())
            order.reverse()
        peaks = {
            name: system.step(measure_memory=True) if memory.can_measure() else None for name, system in systems.items()
        }
    return {name: Measured(name, found, peaks[name]) for name, found in steps.items()}


def compare(case: str, pair: str, ours: Measured, theirs: Measured) -> Ratio:
    """Ratios of the rounds of two systems."""
    ratios = [own / other for own, other in zip(ours.speed(), theirs.speed(), strict=True)]
    own, other = ours.peak(), theirs.peak()
    return Ratio(
        case=case,
        pair=pair,
        speed=statistics.median(ratios),
        slowest=min(ratios),
        fastest=max(ratios),
        cpu_speed=statistics.median(
            own / other for own, other in zip(ours.cpu_speed(), theirs.cpu_speed(), strict=True)
        ),
        memory=None if own is None or other is None else own / other,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if the bars against TRL's PPO hold (or were not judged), else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_step", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", action="store_true", help="a tiny model, seconds: shows that it runs, judges nothing")
    size.add_argument("--fast", action="store_true", help="30M, short prompts and answers, fewer rounds")
    parser.add_argument("--rounds", type=int, help="rounds that count (default: 3; 2 if tiny)")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=["ppo", "grpo"], help="what to compare")
    parser.add_argument("--vocabulary", type=int, help="pieces in the vocabulary, as 150016 (Qwen) or 262144 (Gemma)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, default=report.RESULTS / "ppo_step.json", help="where the numbers go")
    options = parser.parse_args(arguments)
    if {"ppo", "critic"} & set(options.pairs) and not trl_ppo.is_installed():
        parser.error(
            f"TRL {trl_ppo.VERSION} is the last with PPOTrainer and is not in {trl_ppo.FOLDER}: run "
            f"'{trl_ppo.INSTALL}', or leave it out with --pairs grpo."
        )
    chosen = "tiny" if options.tiny else "fast" if options.fast else "full"
    rounds = options.rounds or (2 if options.tiny else 3)
    pairs = {name: PAIRS[name] for name in options.pairs}
    contestants = [one for pair in pairs.values() for one in (pair.ours, pair.theirs)]

    console = Console(width=120)
    before = report.load()
    found: list[tuple[Work, dict[str, Measured]]] = []
    ratios: list[Ratio] = []
    for work in cases(chosen, options.vocabulary):
        with console.status(f"{work.name}: {rounds} rounds of {len(contestants)} systems"):
            measured = measure(work, contestants, rounds, options.threads)
        found.append((work, measured))
        for name, pair in pairs.items():
            ratios.append(compare(work.name, name, measured[pair.ours.name], measured[pair.theirs.name]))
        console.print(steps_table(work, measured, options.threads))
    console.print(ratio_table(ratios, pairs, rounds))
    console.print(f"Load of the machine: {before} before, {report.load()} after (this benchmark included).")
    judged = [ratio for ratio in ratios if ratio.pair == "ppo"] if chosen != "tiny" else []
    kept = _verdict(judged, console)
    report.write_json(
        options.json,
        {
            **report.machine(options.threads),
            "trl_ppo": trl_ppo.VERSION,
            "load": {"before": before, "after": report.load()},
            "bars": {"speed": SPEED_BAR, "memory": MEMORY_BAR},
            "ratios": [asdict(ratio) for ratio in ratios],
            "cases": [as_json(work, measured) for work, measured in found],
        },
    )
    console.print(f"Written to {options.json}.")
    return 0 if kept else 1


def steps_table(work: Work, measured: dict[str, Measured], threads: int) -> Table:
    """Seconds by stage, tokens and memory of each system."""
    table = Table(
        title=f"{work.name}: one step ({threads} CPU threads, float32, {work.epochs} epochs)",
        caption="medians over the rounds; tokens: response tokens; MiB: peak above the idle model",
    )
    table.add_column("system", no_wrap=True)
    for column in ("tokens/s", "tokens", "seconds", "CPU s", *STAGES, "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in measured.values():
        peak = one.peak()
        table.add_row(
            one.name,
            f"{statistics.median(step.tokens / step.seconds for step in one.steps):.1f}",
            f"{statistics.median(step.tokens for step in one.steps):.0f}",
            f"{statistics.median(step.seconds for step in one.steps):.2f}",
            f"{statistics.median(step.cpu_seconds for step in one.steps):.2f}",
            *(f"{one.stage(stage):.2f}" for stage in STAGES),
            "?" if peak is None else f"{peak:.0f}",
        )
    return table


def ratio_table(ratios: list[Ratio], pairs: dict[str, Pair], rounds: int) -> Table:
    """Ours over theirs, case by case."""
    table = Table(title=f"Ours over TRL's, median of {rounds} rounds (smallest to largest)")
    for column in ("case", "pair", "steps per second", "per CPU second", "memory"):
        table.add_column(column, no_wrap=True)
    for ratio in ratios:
        pair = pairs[ratio.pair]
        table.add_row(
            ratio.case,
            f"{pair.ours.name} / {pair.theirs.name}",
            f"{ratio.speed:.2f} ({ratio.slowest:.2f} to {ratio.fastest:.2f})",
            f"{ratio.cpu_speed:.2f}",
            "?" if ratio.memory is None else f"{ratio.memory:.2f}",
        )
    return table


def _verdict(judged: list[Ratio], console: Console) -> bool:
    if not judged:
        return True
    speed = min(ratio.speed for ratio in judged)
    peaks = [ratio.memory for ratio in judged if ratio.memory is not None]
    kept = speed >= SPEED_BAR and all(peak <= MEMORY_BAR for peak in peaks)
    memory_text = f"{max(peaks):.2f}" if peaks else "not measured"
    console.print(
        f"Against TRL's PPOTrainer, worst case: {speed:.2f} times its steps per second (bar {SPEED_BAR:.2f}), memory "
        f"{memory_text} (bar {MEMORY_BAR:.2f}): {'the bars hold' if kept else 'a bar is broken'}."
    )
    return kept


def as_json(work: Work, measured: dict[str, Measured]) -> dict[str, Any]:
    """A case with all its steps."""
    return {"work": asdict(work), "systems": {name: asdict(one) for name, one in measured.items()}}


if __name__ == "__main__":
    raise SystemExit(main())
