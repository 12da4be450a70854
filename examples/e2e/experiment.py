"""Does the reward teach the model to say its facts? Five seeds, with a ceiling and a floor, at matched entropy.

    python -m examples.e2e.experiment --work runs/e2e --jobs 2

For each seed: a start model from scratch, then the same loop with three rewards: CAGSR's (``cagsr.yaml``), the slot checker
itself (the ceiling) and a random number (the floor). Each trained policy is judged on ``test.jsonl`` sampled at temperature 1
and greedy, beside its start, and beside its start at the temperature that gives the trained policy's entropy: a policy that
only became more peaked misses fewer facts when sampled, and gains nothing there. Whatever is done already is kept, so a
stopped experiment goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from cagsr.commands.parse import parse_command
from cagsr.config import TrainConfig
from cagsr.evaluation.metrics import Interval, mean_interval, paired_difference
from cagsr.runs.atomic import write_text_atomically
from examples.e2e.evaluate import Evaluation, evaluate, match_entropy
from examples.e2e.prepare import read_jsonl

Arm = Literal["cagsr", "checker", "random"]
ARMS: tuple[Arm, ...] = ("cagsr", "checker", "random")
MEASURES = ("missed", "added", "wrong", "rouge_l", "repetition", "tokens", "entropy")
CONFIG = Path(__file__).with_name("cagsr.yaml")
CHECKER = Path(__file__).with_name("checker.yaml")
RANDOM = Path(__file__).with_name("random.yaml")


@dataclass(frozen=True)
class Options:
    """Run the experiment, or only write its report."""

    work: Path = Path("runs/e2e")
    """Folder that ``examples.e2e.prepare`` wrote; runs and results go below it."""
    seeds: int = 5
    """Start models, each trained with each reward."""
    jobs: int = 1
    """Runs at a time; the cores are shared among them."""
    steps: int | None = None
    """Steps of each run; None: as in the config files."""
    report: Path | None = None
    """Markdown report; None: ``work/report.md``."""
    only: tuple[int, Arm] | None = None
    """One seed and reward, in this process (how the jobs are started)."""


def run_one(work: Path, seed: int, arm: Arm, steps: int | None) -> None:
    """Train one policy and write ``results/seed{seed}-{arm}.json``; the start model is made where it is missing."""
    start, run = work / f"sft-seed{seed}", work / f"{arm}-seed{seed}"
    if not (start / "config.json").exists():
        subprocess.run(
            [sys.executable, "-m", "examples.e2e.pretrain", "--work", work, "--output", start, "--seed", str(seed)],
            check=True,
        )
    if not (run / "final" / "config.json").exists():
        from cagsr.train import train

        files = {"cagsr": [], "checker": [CHECKER], "random": [RANDOM]}[arm]
        argv = ["--config", str(CONFIG)]
        for file in files:
            argv += ["--config", str(file)]
        argv += ["--model", str(start), "--data", str(work / "unlabelled.jsonl"), "--output_dir", str(run)]
        argv += ["--evaluation.path", str(work / "held_out.jsonl"), "--seed", str(seed)]
        argv += ["--resume"] if (run / "config.yaml").exists() else []
        argv += ["--steps", str(steps)] if steps is not None else []
        train(parse_command(TrainConfig, argv, prog="experiment"))
    _judge(work, seed, arm, start, run / "final")


def _judge(work: Path, seed: int, arm: Arm, start: Path, final: Path) -> None:
    test = work / "test.jsonl"
    sampled, greedy = evaluate(final, test, temperatures=(1.0, 0.0), seed=seed)
    prompts = [row["prompt"] for row in read_jsonl(test)][::4]
    target = float(sampled.values["entropy"][::4].mean())
    temperature = match_entropy(start, prompts, target, seed=seed, low=0.02, tolerance=0.01)
    (matched,) = evaluate(start, test, temperatures=(temperature,), seed=seed)
    base = work / "results" / f"seed{seed}-start.json"
    if not base.exists():
        _write(base, dict(zip(("sampled", "greedy"), evaluate(start, test, (1.0, 0.0), seed=seed), strict=True)))
    _write(
        work / "results" / f"seed{seed}-{arm}.json",
        {"sampled": sampled, "greedy": greedy, "start_matched": matched},
        temperature=temperature,
    )


def _write(path: Path, found: dict[str, Evaluation], **more: float) -> None:
    values = {
        name: {measure: result.values[measure].tolist() for measure in MEASURES} for name, result in found.items()
    }
    texts = {name: list(result.texts[:20]) for name, result in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps({"values": values, "texts": texts, **more}))


def _start_jobs(options: Options) -> None:
    """Run every missing seed and reward in a process of its own; start models come first, one a seed."""
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def job(seed: int, arm: Arm) -> None:
        if (options.work / "results" / f"seed{seed}-{arm}.json").exists():
            return
        command = [sys.executable, "-m", "examples.e2e.experiment", "--work", str(options.work)]
        command += ["--only", str(seed), arm]
        command += ["--steps", str(options.steps)] if options.steps is not None else []
        log = options.work / f"seed{seed}-{arm}.log"
        with open(log, "a", encoding="utf-8") as stream:
            print(f"seed {seed} {arm}: running, see {log}", flush=True)
            subprocess.run(command, check=True, env=environment, stdout=stream, stderr=stream)

    def one_seed(seed: int) -> None:
        for arm in ARMS:
            job(seed, arm)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one_seed, range(options.seeds)))


def _values(work: Path, seeds: list[int], arm: str, setting: str, measure: str) -> Any:
    rows = [json.loads((work / "results" / f"seed{seed}-{arm}.json").read_text()) for seed in seeds]
    return np.array([row["values"][setting][measure] for row in rows])


def write_report(work: Path, path: Path) -> str:
    """Put every measure with its interval over seeds and prompts in one Markdown file; return its text."""
    seeds = sorted(
        seed for seed in range(100) if all((work / "results" / f"seed{seed}-{arm}.json").exists() for arm in ARMS)
    )
    if not seeds:
        raise SystemExit(f"{work / 'results'} holds no finished seed: run the experiment first.")

    def values(arm: str, setting: str, measure: str) -> Any:
        return _values(work, seeds, arm, setting, measure)

    def level(arm: str, setting: str, measure: str) -> str:
        return f"{np.mean(values(arm, setting, measure)):.3f}"

    def change(after: Any, before: Any) -> Interval:
        return paired_difference(after, before)

    measures = ("missed", "added", "wrong", "rouge_l", "repetition", "tokens", "entropy")
    lines = [
        f"Seeds: {len(seeds)}; test prompts: {values('start', 'greedy', 'missed').shape[1]}. Each cell is a mean over seeds "
        "and prompts; brackets are 95 % intervals of the paired difference, bootstrapped over seeds and prompts.",
        "",
        "| policy | decoding | " + " | ".join(measures) + " |",
        "| --- | --- | " + " | ".join("---" for _ in measures) + " |",
    ]
    for arm in ("start", *ARMS):
        for setting, decoding in (("sampled", "sampled, T = 1"), ("greedy", "greedy")):
            cells = " | ".join(level(arm, setting, measure) for measure in measures)
            lines.append(f"| {arm} | {decoding} | {cells} |")
    for arm in ARMS:
        temperatures = [
            json.loads((work / "results" / f"seed{seed}-{arm}.json").read_text())["temperature"] for seed in seeds
        ]
        cells = " | ".join(level(arm, "start_matched", measure) for measure in measures)
        lines.append(f"| start | at the entropy of {arm} (T = {np.mean(temperatures):.2f}) | {cells} |")
    lines += [
        "",
        "| missed slots, difference | cagsr | checker (ceiling) | random (floor) | cagsr / ceiling |",
        "| --- | --- | --- | --- | --- |",
    ]
    comparisons = {
        "sampled against the start sampled": ("sampled", "start", "sampled"),
        "sampled against the start at matched entropy": ("sampled", None, "start_matched"),
        "greedy against the start greedy": ("greedy", "start", "greedy"),
    }
    for measure in ("missed", "added"):
        for name, (setting, other, other_setting) in comparisons.items():
            found = [
                change(values(arm, setting, measure), values(other or arm, other_setting, measure)) for arm in ARMS
            ]
            share = f"{found[0].mean / found[1].mean:.2f}" if abs(found[1].mean) > 1e-9 else "-"
            label = name if measure == "missed" else f"added slots: {name}"
            lines.append(f"| {label} | {found[0]} | {found[1]} | {found[2]} | {share if measure == 'missed' else ''} |")
    per_seed = []
    for i, seed in enumerate(seeds):
        moves = [
            f"{values('start', how, 'missed')[i].mean():.3f} -> {values('cagsr', how, 'missed')[i].mean():.3f} {how}"
            for how in ("sampled", "greedy")
        ]
        per_seed.append(f"{seed}: {', '.join(moves)}")
    lines += ["", "Missed slots by seed, start -> cagsr:", "", *(f"- seed {line}" for line in per_seed), ""]
    start_missed = mean_interval(values("start", "sampled", "missed"))
    lines.append(f"The start misses {start_missed} of the facts sampled at T = 1.")
    text = "\n".join(lines) + "\n"
    write_text_atomically(path, text)
    return text


def main(options: Options) -> None:
    """Run what is missing and print the report."""
    if options.only is not None:
        run_one(options.work, *options.only, options.steps)
        return
    _start_jobs(options)
    print(write_report(options.work, options.report or options.work / "report.md"))


if __name__ == "__main__":
    main(tyro.cli(Options))
