"""From a plan to its jobs: what depends on what, and which of them are done as the plan stands now."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cagsr.compare.plan import START, Plan
from cagsr.errors import ConfigError
from cagsr.runs.fingerprint import fingerprint_path
from cagsr.support.atomic import write_text_atomically

Kind = Literal["prepare", "judges", "start", "reward_model", "method", "validity"]
SAMPLED, GREEDY, MATCHED = "sampled", "greedy", "start_matched"
"""Names of the settings in a result: the policy at the sampling temperature, greedy, its start at matched entropy."""


@dataclass(frozen=True)
class Job:
    """One piece of work in one process."""

    kind: Kind
    target: str
    """Method or reward model; empty where there is only one."""
    seed: int | None
    needs: tuple[str, ...]
    """Names of the jobs that must be done before."""
    fingerprint: str
    """Hash of everything that its result depends on; a result with another one is out of date."""
    training: str = ""
    """Hash of what it makes depends on, however that is judged."""
    reads: tuple[str, ...] = ()
    """Files that what it makes depends on, those of the jobs it needs included; what lies there may change."""
    judged_on: tuple[str, ...] = ()
    """Files and models that it is judged with."""

    @property
    def name(self) -> str:
        """Unique name, fit for a file name."""
        return "-".join(filter(None, (self.kind, self.target, "" if self.seed is None else f"seed{self.seed}")))

    def done_file(self, plan: Plan) -> Path:
        """Where it says that it is done."""
        folder = plan.results_folder if self.kind in ("method", "validity") else plan.folder
        return folder / "done" / f"{self.name}.json"

    def is_done(self, plan: Plan) -> bool:
        """Whether it was done with the plan and the files as they are now."""
        facts = self.facts(plan)
        return bool(facts.get("fingerprint") == self.fingerprint) and not changed(facts.get("inputs", {}))

    def facts(self, plan: Plan) -> dict[str, Any]:
        """What :meth:`mark_done` kept; empty where it was never done."""
        try:
            found = json.loads(self.done_file(plan).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def mark_done(self, plan: Plan, **facts: Any) -> None:
        """Say that it is done, with what is worth keeping (times, memory)."""
        write_file(self.done_file(plan), json.dumps({"fingerprint": self.fingerprint, **facts}))


def write_file(file: Path, text: str) -> None:
    """Write a file whole, in a folder that need not be there yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, text)


def contents(paths: Sequence[str]) -> dict[str, str]:
    """A hash of what lies at each path, where something does."""
    found = {path: fingerprint_path(path) for path in paths}
    return {path: value for path, value in found.items() if value is not None}


def changed(before: Mapping[str, str]) -> bool:
    """Whether something else lies at a path than when :func:`contents` looked. What is gone can't be compared."""
    now = contents(list(before))
    return any(now.get(path, value) != value for path, value in before.items())


def plan_jobs(plan: Plan) -> list[Job]:
    """Every job of a plan, each after those it needs; those of the main table first, then the others, seed by seed.

    A comparison that is stopped early has then something of everything. Raises ConfigError for a config file that can't be
    read.
    """
    jobs: dict[str, Job] = {}

    def add(
        kind: Kind,
        target: str,
        seed: int | None,
        needs: list[Job],
        *facts: Any,
        judged: Any = None,
        reads: Sequence[str | None] = (),
    ) -> Job:
        # A method that starts from another's policy does not depend on how that one was judged.
        training = _hash(kind, target, seed, facts, [job.training for job in needs])
        made = [jobs["judges"]] if judged is not None and "judges" in jobs else []
        names = tuple(dict.fromkeys(job.name for job in (*needs, *made)))
        own = [plan.fill(path) for path in reads if path is not None]
        files = tuple(dict.fromkeys((*(path for job in needs for path in job.reads), *own)))
        fingerprint = _hash(training, judged, [job.fingerprint for job in made])
        job = Job(kind, target, seed, names, fingerprint, training, files, () if judged is None else judges_files)
        jobs[job.name] = job
        return job

    prepare = [add("prepare", "", None, [], plan.prepare, plan.work)] if plan.prepare else []
    if plan.prepare_judges:
        add("judges", "", None, prepare, plan.prepare_judges)
    trained = (plan.files.train, plan.files.held_out, _texts(plan.configs), plan.set)
    judged = (dataclasses.asdict(plan.files), dataclasses.asdict(plan.judges))
    judges = (plan.judges.judge_model, plan.judges.embedding_model, plan.judges.reward_model)
    judges_files = tuple(plan.fill(path) for path in (plan.files.test, *judges) if path is not None)
    prompts = (plan.files.train, plan.files.held_out)

    @cache
    def start(seed: int) -> Job:
        return add("start", "", seed, prepare, plan.start)

    @cache
    def reward_model(name: str, seed: int) -> Job:
        spec = plan.reward_models[name]
        reads = (spec.data, spec.held_out)
        return add("reward_model", name, seed, [start(seed)], dataclasses.asdict(spec), reads=reads)

    @cache
    def policy(name: str, seed: int) -> Job:
        method = plan.methods[name]
        needs = [start(seed)]
        if method.reward_model is not None:
            # DPO needs the pairs only, but its reward model's accuracy belongs beside it.
            needs.append(reward_model(method.reward_model, seed))
        if method.after not in (None, START):
            needs.append(policy(str(method.after), seed))
        shown_only = ("label", "group", "curve", "seeds")
        own = {key: value for key, value in dataclasses.asdict(method).items() if key not in shown_only}
        read = () if method.kind == "dpo" else prompts
        return add("method", name, seed, needs, own, _texts(method.configs), *trained, judged=judged, reads=read)

    for seed in plan.seeds:
        add("method", START, seed, [start(seed)], _texts(plan.configs), plan.set, judged=judged)
    for name in plan.methods:
        for seed in plan.seeds_of(name):
            policy(name, seed)
    if plan.validity is not None:
        for seed in plan.seeds[: plan.validity.seeds]:
            base = plan.methods[plan.settings_method]
            facts = (dataclasses.asdict(plan.validity), dataclasses.asdict(base), *trained)
            add("validity", "", seed, [start(seed)], *facts, reads=(*prompts, plan.validity.file))
    return _in_order_of_weight(plan, list(jobs.values()))


def _in_order_of_weight(plan: Plan, jobs: list[Job]) -> list[Job]:
    """Main and control methods first, then labels and ablations; in both one seed of each method before the next."""
    place = {name: number for number, name in enumerate(plan.methods)}

    def rank(job: Job) -> tuple[int, int, int]:
        if job.kind == "reward_model":
            return min(rank(user) for user in jobs if job.name in user.needs)
        if job.kind == "validity":
            return (0, 0, len(place))
        if job.seed is None:
            return (0, 0, -1)
        if job.kind != "method" or job.target == START:
            return (0, plan.seeds.index(job.seed), -1)
        method = plan.methods[job.target]
        main = method.group in ("main", "control")
        after = place.get(method.after or "", 0)
        return (0 if main else 1, plan.seeds.index(job.seed), max(place[job.target], after))

    return sorted(jobs, key=rank)


def _hash(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _texts(configs: list[str]) -> list[str]:
    found = []
    for name in configs:
        try:
            found.append(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {name}, named by the plan, can't be read; mend its path.") from error
    return found
