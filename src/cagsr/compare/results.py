"""What the finished jobs left: numbers by method, seed, setting and measure, ready for statistics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cagsr.compare.jobs import (
    GREEDY,
    MATCHED,
    SAMPLED,
    Job,
    method_folder,
    result_file,
    reward_model_folder,
    validity_file,
)
from cagsr.compare.plan import START, Plan
from cagsr.run_page.step_times import step_seconds
from cagsr.runs.lines import read_lines

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """The results of a plan that are up to date."""

    plan: Plan
    jobs: Sequence[Job]
    _read: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def seeds(self, method: str) -> list[int]:
        """Seeds with which a method was judged, and its start with it."""
        done = {
            job.seed for job in self.jobs if job.kind == "method" and job.target == method and job.is_done(self.plan)
        }
        starts = {
            job.seed for job in self.jobs if job.kind == "method" and job.target == START and job.is_done(self.plan)
        }
        return [seed for seed in self.plan.seeds if seed in done & starts]

    @property
    def methods(self) -> list[str]:
        """The methods that have results, the start first."""
        return [name for name in (START, *self.plan.methods) if self.seeds(name)]

    def raw(self, method: str, seed: int) -> dict[str, Any]:
        """The result of one method and seed as it was written."""
        if (method, seed) not in self._read:
            file = result_file(self.plan, method, seed)
            self._read[method, seed] = json.loads(file.read_text(encoding="utf-8"))
        return self._read[method, seed]

    def has(self, method: str, setting: str, measure: str) -> bool:
        """Whether a method was measured so with all its seeds."""
        seeds = self.seeds(method)
        return bool(seeds) and all(measure in self.raw(method, seed)["values"].get(setting, {}) for seed in seeds)

    def values(self, method: str, setting: str, measure: str, seeds: Sequence[int] | None = None) -> Floats:
        """``(seeds, prompts)`` values of a measure; KeyError where it was not measured."""
        chosen = self.seeds(method) if seeds is None else seeds
        return np.array([self.raw(method, seed)["values"][setting][measure] for seed in chosen], dtype=np.float64)

    @property
    def measures(self) -> list[str]:
        """The measures of the start, in the judge's order."""
        seeds = self.seeds(START)
        return list(self.raw(START, seeds[0])["values"][SAMPLED]) if seeds else []

    def gain(self, method: str, how: str, measure: str, seeds: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        """A method's values and what they are compared with, ``(seeds, prompts)`` both.

        ``how``: ``sampled`` against the start sampled alike, ``start_matched``: sampled against the start at matched entropy,
        ``greedy`` against the start greedy.
        """
        chosen = self.seeds(method) if seeds is None else seeds
        if how == MATCHED:
            return self.values(method, SAMPLED, measure, chosen), self.values(method, MATCHED, measure, chosen)
        return self.values(method, how, measure, chosen), self.values(START, how, measure, chosen)

    def can_gain(self, method: str, how: str, measure: str) -> bool:
        """Whether :meth:`gain` has what it needs."""
        if method == START:
            return False
        if how == MATCHED:
            return self.has(method, SAMPLED, measure) and self.has(method, MATCHED, measure)
        return self.has(method, how, measure) and self.has(START, how, measure)

    def costs(self, method: str) -> dict[str, float]:
        """Mean seconds, peak memory and labels of a method's jobs."""
        rows = [self.raw(method, seed)["costs"] | self._trained(method, seed) for seed in self.seeds(method)]
        found = {
            name: float(np.mean([row[name] for row in rows])) for name in rows[0] if all(name in row for row in rows)
        }
        done = [job.facts(self.plan) for job in self._done("method", method)]
        found["peak_memory_bytes"] = float(np.mean([row["peak_memory_bytes"] for row in done]))
        reward_model = None if method == START else self.plan.methods[method].reward_model
        if reward_model is not None and self.plan.methods[method].kind != "dpo":
            models = [job.facts(self.plan) for job in self._done("reward_model", reward_model)]
            if models:
                found["reward_model_seconds"] = float(np.mean([row["seconds"] for row in models]))
        return found

    def _trained(self, method: str, seed: int) -> dict[str, float]:
        """The seconds of a run's steps: all of them, although the job that judged it may have found it trained already."""
        file = method_folder(self.plan.folder, method, seed) / "timings.jsonl"
        # What is best of N now may have been a run before.
        untrained = method != START and self.plan.methods[method].kind == "best_of_n"
        if untrained or not file.exists():
            return {}
        return {"train_seconds": float(sum(step_seconds(row) for row in read_lines(file)))}

    def accuracies(self) -> dict[str, list[dict[str, Any]]]:
        """What each trained reward model said of itself, a row a seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for job in self.jobs:
            if job.kind == "reward_model" and job.is_done(self.plan) and job.seed is not None:
                file = reward_model_folder(self.plan.folder, job.target, job.seed) / "metrics.json"
                found.setdefault(job.target, []).append(json.loads(file.read_text(encoding="utf-8")))
        return found

    def validity(self) -> list[dict[str, Any]]:
        """The measurements of the reward's validity, one a seed."""
        seeds = [job.seed for job in self.jobs if job.kind == "validity" and job.is_done(self.plan)]
        return [
            json.loads(validity_file(self.plan, seed).read_text(encoding="utf-8")) for seed in seeds if seed is not None
        ]

    def training(self, method: str) -> list[list[dict[str, float]]]:
        """The training curves of a method, one a seed."""
        return [self.raw(method, seed)["training"] for seed in self.seeds(method)]

    def _done(self, kind: str, target: str) -> list[Job]:
        return [job for job in self.jobs if job.kind == kind and job.target == target and job.is_done(self.plan)]


__all__ = ["GREEDY", "MATCHED", "SAMPLED", "Results"]
