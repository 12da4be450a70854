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
from cagsr.evaluation.metrics import paired_difference
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
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Start models, each trained with each reward."""
    arms: tuple[Arm, ...] = ARMS
    """Rewards: cagsr, checker (the ceiling), random (the floor)."""
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
    prompts = [row["prompt"] for row in read_jsonl(test)][::2]
    target = float(sampled.values["entropy"][::2].mean())
    temperature = match_entropy(start, prompts, target, seed=seed, low=0.2, high=1.2)
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
    # Threads that wait for one another on cores they share with another job slow a run down tenfold.
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ

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
        for arm in options.arms:
            job(seed, arm)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one_seed, options.seeds))


@dataclass(frozen=True)
class _Results:
    """What the finished runs under ``work/results`` hold."""

    work: Path

    def seeds(self, arm: str) -> list[int]:
        """Seeds whose start and whose run with this reward were judged."""
        found = self.work / "results"
        names = (arm, "start")
        return [seed for seed in range(100) if all((found / f"seed{seed}-{name}.json").exists() for name in names)]

    def read(self, seed: int, arm: str) -> dict[str, Any]:
        return json.loads((self.work / "results" / f"seed{seed}-{arm}.json").read_text(encoding="utf-8"))

    def values(self, seeds: list[int], arm: str, setting: str, measure: str) -> Any:
        """``(seeds, prompts)``."""
        return np.array([self.read(seed, arm)["values"][setting][measure] for seed in seeds])


COMPARISONS = {
    "sampled at T = 1, against the start sampled at T = 1": ("sampled", "start", "sampled"),
    "sampled at T = 1, against the start at matched entropy": ("sampled", None, "start_matched"),
    "greedy, against the start greedy": ("greedy", "start", "greedy"),
}


def write_report(work: Path, path: Path) -> str:
    """Put every measure with its interval over seeds and prompts in one Markdown file; return its text."""
    results = _Results(work)
    arms = [arm for arm in ARMS if results.seeds(arm)]
    if not arms:
        raise SystemExit(f"{work / 'results'} holds no finished run: run the experiment first.")
    counts = ", ".join(f"{arm}: {len(results.seeds(arm))}" for arm in arms)
    prompts = len(results.read(results.seeds(arms[0])[0], "start")["values"]["greedy"]["missed"])
    lines = [
        f"Seeds: {counts}. Test prompts: {prompts}. Cells are means over seeds and prompts; missed, added and wrong are "
        "shares of a prompt's facts, entropy is in nats a token.",
        "",
        "| policy | decoding | " + " | ".join(MEASURES) + " |",
        "| --- | --- | " + " | ".join("---" for _ in MEASURES) + " |",
    ]
    for arm in ("start", *arms):
        seeds = results.seeds(arm if arm != "start" else arms[0])
        for setting, decoding in (("sampled", "sampled, T = 1"), ("greedy", "greedy")):
            lines.append(_row(arm, decoding, [results.values(seeds, arm, setting, name) for name in MEASURES]))
    for arm in arms:
        seeds = results.seeds(arm)
        temperature = np.mean([results.read(seed, arm)["temperature"] for seed in seeds])
        cells = [results.values(seeds, arm, "start_matched", name) for name in MEASURES]
        lines.append(_row("start", f"at the entropy of {arm} (T = {temperature:.2f})", cells))
    for measure in ("missed", "added", "wrong", "repetition", "rouge_l"):
        lines += [
            "",
            f"Difference in {measure}, with the 95 % interval of the paired difference over seeds and prompts:",
        ]
        lines += ["", "| comparison | " + " | ".join(arms) + " | cagsr / checker |", "| --- " * (len(arms) + 2) + "|"]
        for name, (setting, other, other_setting) in COMPARISONS.items():
            found = []
            for arm in arms:
                seeds = results.seeds(arm)
                after = results.values(seeds, arm, setting, measure)
                found.append(paired_difference(after, results.values(seeds, other or arm, other_setting, measure)))
            share = _share_of_ceiling(results, setting, other, other_setting) if measure == "missed" else ""
            lines.append(f"| {name} | " + " | ".join(map(str, found)) + f" | {share} |")
    lines += ["", "Missed slots by seed, start -> cagsr:", ""]
    for seed in results.seeds("cagsr"):
        moves = []
        for how in ("sampled", "greedy"):
            before, after = (results.values([seed], arm, how, "missed").mean() for arm in ("start", "cagsr"))
            moves.append(f"{how} {before:.3f} -> {after:.3f}")
        lines.append(f"- seed {seed}: {', '.join(moves)}")
    text = "\n".join(lines) + "\n"
    write_text_atomically(path, text)
    return text


def _share_of_ceiling(results: _Results, setting: str, other: str | None, other_setting: str) -> str:
    """CAGSR's mean gain over the checker's, on the seeds that have both."""
    seeds = sorted(set(results.seeds("cagsr")) & set(results.seeds("checker")))
    if not seeds:
        return ""
    gains = [
        (
            results.values(seeds, other or arm, other_setting, "missed") - results.values(seeds, arm, setting, "missed")
        ).mean()
        for arm in ("cagsr", "checker")
    ]
    return f"{gains[0] / gains[1]:.2f} (seeds {', '.join(map(str, seeds))})" if abs(gains[1]) > 1e-9 else ""


def _row(policy: str, decoding: str, cells: list[Any]) -> str:
    return f"| {policy} | {decoding} | " + " | ".join(f"{np.mean(cell):.3f}" for cell in cells) + " |"


def main(options: Options) -> None:
    """Run what is missing and print the report."""
    if options.only is not None:
        run_one(options.work, *options.only, options.steps)
        return
    _start_jobs(options)
    print(write_report(options.work, options.report or options.work / "report.md"))


if __name__ == "__main__":
    main(tyro.cli(Options))
