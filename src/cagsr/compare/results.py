"""What the finished jobs left: numbers by method, seed, setting and measure, ready for statistics."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cagsr.compare.jobs import MATCHED, SAMPLED, Job
from cagsr.compare.plan import START, Plan
from cagsr.evaluation.intervals import Floats
from cagsr.run_page.read_run import step_seconds
from cagsr.runs.lines import read_lines


@dataclass(frozen=True)
class Results:
    """The results of a plan that are up to date when they are first asked for."""

    plan: Plan
    jobs: Sequence[Job]
    _read: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def _done(self) -> list[Job]:
        return [job for job in self.jobs if job.is_done(self.plan)]

    def _done_of(self, kind: str, target: str) -> list[Job]:
        return [job for job in self._done if job.kind == kind and job.target == target]

    def seeds(self, method: str) -> list[int]:
        """Seeds with which a method was judged, and its start with it."""
        done, starts = ({job.seed for job in self._done_of("method", name)} for name in (method, START))
        return [seed for seed in self.plan.seeds if seed in done & starts]

    @property
    def methods(self) -> list[str]:
        """The methods that have results, the start first."""
        return [name for name in (START, *self.plan.methods) if self.seeds(name)]

    def raw(self, method: str, seed: int) -> dict[str, Any]:
        """The result of one method and seed as it was written."""
        if (method, seed) not in self._read:
            file = self.plan.result_file(method, seed)
            self._read[method, seed] = json.loads(file.read_text(encoding="utf-8"))
        return self._read[method, seed]

    def values(self, method: str, setting: str, measure: str, seeds: Sequence[int] | None = None) -> Floats | None:
        """``(seeds, prompts)`` values of a measure; None where it was not measured so with all the method's seeds."""
        tables = {seed: self.raw(method, seed)["values"].get(setting, {}) for seed in self.seeds(method)}
        if not tables or any(measure not in table for table in tables.values()):
            return None
        return np.array([tables[seed][measure] for seed in (tables if seeds is None else seeds)], dtype=np.float64)

    @property
    def measures(self) -> list[str]:
        """The measures of the start, in the judge's order."""
        seeds = self.seeds(START)
        return list(self.raw(START, seeds[0])["values"][SAMPLED]) if seeds else []

    def pair(self, method: str, how: str, measure: str, against: str = START) -> tuple[Floats, Floats] | None:
        """A method's values and what they are compared with, on the seeds of both; ``(seeds, prompts)`` each.

        ``how``: ``sampled`` or ``greedy``: both decoded so. ``start_matched``: the method sampled, the start at matched
        entropy; against another method, the gains that both have so. Prompts on which an answer has no such measure (equations
        that hold, where there is none) are left out of both. None where one of them was not measured so, or on no prompt.
        """
        seeds = [seed for seed in self.seeds(method) if seed in self.seeds(against)]
        if method == START or not seeds:
            return None
        read = [(method, how), (against, how)]
        if how == MATCHED:
            names = (method,) if against == START else (method, against)
            read = [(name, setting) for name in names for setting in (SAMPLED, MATCHED)]
        found = [self.values(name, setting, measure, seeds) for name, setting in read]
        known = [values for values in found if values is not None]
        if len(known) < len(found):
            return None
        first, second, *other = known
        after, before = (first - second, other[0] - other[1]) if other else (first, second)
        measured = np.isfinite([after, before]).all(axis=(0, 1))
        return (after[:, measured], before[:, measured]) if measured.any() else None

    def costs(self, method: str) -> dict[str, float]:
        """Mean seconds, peak memory and labels of a method's jobs."""
        rows = [self.raw(method, seed)["costs"] | self._trained(method, seed) for seed in self.seeds(method)]
        shared = [name for name in rows[0] if all(name in row for row in rows)]
        found = {name: float(np.mean([row[name] for row in rows])) for name in shared}
        found["peak_memory_bytes"] = self._mean_fact("method", method, "peak_memory_bytes")
        reward_model = None if method == START else self.plan.methods[method].reward_model
        trained = reward_model is not None and self.plan.methods[method].kind != "dpo"
        if trained and self._done_of("reward_model", str(reward_model)):
            found["reward_model_seconds"] = self._mean_fact("reward_model", str(reward_model), "seconds")
        return found

    def _mean_fact(self, kind: str, target: str, name: str) -> float:
        return float(np.mean([job.facts(self.plan)[name] for job in self._done_of(kind, target)]))

    def _trained(self, method: str, seed: int) -> dict[str, float]:
        """The seconds of a run's steps: all of them, although the job that judged it may have found it trained already."""
        file = self.plan.method_folder(method, seed) / "timings.jsonl"
        # What is best of N now may have been a run before.
        untrained = method != START and self.plan.methods[method].kind == "best_of_n"
        if untrained or not file.exists():
            return {}
        return {"train_seconds": float(sum(step_seconds(row) for row in read_lines(file)))}

    def accuracies(self) -> dict[str, list[dict[str, Any]]]:
        """What each trained reward model said of itself, a row a seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for job in self._done:
            if job.kind == "reward_model" and job.seed is not None:
                file = self.plan.reward_model_folder(job.target, job.seed) / "metrics.json"
                found.setdefault(job.target, []).append(json.loads(file.read_text(encoding="utf-8")))
        return found

    def validity(self) -> list[dict[str, Any]]:
        """The measurements of the reward's validity, one a seed."""
        seeds = [job.seed for job in self._done_of("validity", "") if job.seed is not None]
        return [json.loads(self.plan.result_file("validity", seed).read_text(encoding="utf-8")) for seed in seeds]

    def training(self, method: str) -> list[list[dict[str, float]]]:
        """The training curves of a method, one a seed."""
        return [self.raw(method, seed)["training"] for seed in self.seeds(method)]
