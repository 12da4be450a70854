"""Run every reward of ``runs.yaml`` under every leash, from one start, and keep the metrics of each run.

    python -m examples.forecast.runs --start llama=runs/paper/start-seed0 --train runs/paper/unlabelled.jsonl \
        --held_out runs/paper/held_out.jsonl --work runs/forecast

or, from what ``cagsr quickstart`` leaves, in a quarter of the time:

    python -m examples.forecast.runs --start quickstart=quickstart/start --train quickstart/prompts.jsonl \
        --held_out quickstart/held_out.jsonl --metric examples.forecast.truth.net_facts --work runs/forecast --seeds 2

A run that is done is not made again, so that the command goes on where it was interrupted. What they say is put together by
``python -m examples.forecast.table``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from cagsr.errors import CagsrError, RunError
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import say, shown, working

PLAN = Path(__file__).with_name("runs.yaml")
KEPT = ("metrics.jsonl", "config.yaml")


@dataclass(frozen=True)
class Options:
    """Make the runs."""

    start: str
    """NAME=FOLDER of the starting model; the name tells its runs from those of other starts."""
    train: Path
    """Prompts without answers."""
    held_out: Path
    """Prompts that the checker judges."""
    work: Path
    """Where the runs' folders go."""
    metric: str | None = None
    """The checker, where it is another than the plan's: a dotted path, as evaluation.metric takes it."""
    plan: Path = PLAN
    """Settings, rewards and leashes."""
    seeds: int = 1
    """Runs of each reward under each leash."""
    threads: int = 1
    """Threads of a run."""


def runs_of(plan: dict[str, Any], seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of each run."""
    for seed in range(seeds):
        for leash, given in plan["leashes"].items():
            for reward, terms in plan["rewards"].items():
                settings = yaml.safe_load(yaml.safe_dump(plan["settings"]))
                section = settings.setdefault("reward", {})
                section.setdefault("grounded_coverage", {})["weight"] = 0.0
                for key, value in {**given, **{f"reward.{key}": value for key, value in terms.items()}}.items():
                    *path, last = key.split(".")
                    place = settings
                    for part in path:
                        place = place.setdefault(part, {})
                    place[last] = value
                paid = {key.partition(".")[0] for key in terms}
                section["watched"] = [
                    one for one in section["watched"] if one not in paid and not section.get(one, {}).get("weight")
                ]
                settings["run"]["seed"] = seed
                yield f"{reward}-{leash}-{seed}", settings


def main(options: Options) -> None:
    """Make all runs that are not there yet."""
    name, _, folder = options.start.partition("=")
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    todo = list(runs_of(plan, options.seeds))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    judged_by = {"path": str(options.held_out)} | ({} if options.metric is None else {"metric": options.metric})
    made = 0
    with shown("forecast runs"), working("runs", len(todo), "runs") as task:
        for label, settings in todo:
            run = options.work / f"{name}-{label}"
            if not (run / "done").is_file():
                shutil.rmtree(run, ignore_errors=True)
                config = options.work / f"{name}-{label}.yaml"
                config.parent.mkdir(parents=True, exist_ok=True)
                settings = {
                    **settings,
                    "model": {"path": folder, "device": "cpu"},
                    "data": {"path": str(options.train)},
                    "evaluation": {**settings["evaluation"], **judged_by},
                    "output_dir": str(run),
                }
                write_text_atomically(config, yaml.safe_dump(settings, sort_keys=False))
                command = [sys.executable, "-m", "cagsr.commands.main", "train", "--config", str(config)]
                found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if found.returncode != 0:
                    raise RunError(f"{run}: cagsr train failed: {found.stderr.strip().splitlines()[-1:]}")
                for path in run.iterdir():
                    if path.name not in KEPT:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                write_text_atomically(run / "done", "")
                made += 1
            task.advance()
    say(f"{options.work}: {made} runs made, {len(todo) - made} were there.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except CagsrError as error:
        sys.exit(str(error))
