"""Do one job of a plan in this process: ``python -m cagsr.compare.worker PLAN JOB [--fast] [NAME=VALUE ...]``."""

import dataclasses
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from cagsr.compare.jobs import Job, contents, plan_jobs
from cagsr.compare.plan import START, Plan, read_plan
from cagsr.errors import CagsrError, ConfigError
from cagsr.support.progress import shown


def do_job(plan: Plan, job: Job) -> None:
    """Do a job whose needs are done, and mark it; raises CagsrError where its input is bad."""
    from cagsr.compare import make_models

    began = time.perf_counter()
    inputs = contents([*job.reads, *job.judged_on])  # as they are when the work begins
    facts: dict[str, float] = {}
    if job.kind in ("prepare", "judges"):
        for command in plan.prepare if job.kind == "prepare" else plan.prepare_judges:
            make_models.run_command(plan, command)
    elif job.kind == "start":
        make_models.make_start(plan, job)
    elif job.kind == "reward_model":
        make_models.make_reward_model(plan, job)
    elif job.kind == "method":
        from cagsr.compare.judge_policy import judge_method

        trains = job.target != START and plan.methods[job.target].kind != "best_of_n"
        model = make_models.make_policy(plan, job) if trains else None
        facts["train_seconds"] = time.perf_counter() - began if trains else 0.0
        facts["human_labels"] = float(human_labels(plan, job))
        judge_method(plan, job, model, facts)
    else:
        from cagsr.compare.reward_validity import measure_validity

        measure_validity(plan, job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    job.mark_done(plan, inputs=inputs, seconds=time.perf_counter() - began, peak_memory_bytes=peak, **facts)


def human_labels(plan: Plan, job: Job) -> int:
    """How many people's judgements a method has used, those of the method it starts from included."""
    if job.target == START:
        return 0
    method = plan.methods[job.target]
    before = 0 if method.after is None else human_labels(plan, dataclasses.replace(job, target=method.after))
    if method.reward_model is None or not plan.reward_models[method.reward_model].human:
        return before
    spec = plan.reward_models[method.reward_model]
    if spec.num_pairs is not None:
        return max(before, spec.num_pairs)
    if method.kind == "dpo":
        from cagsr.preferences.pairs import count_pairs

        columns = (str(method.set.get(f"{name}_column", name)) for name in ("chosen", "rejected"))
        return max(before, count_pairs(plan.fill(spec.data), *columns))
    assert job.seed is not None
    told = json.loads((plan.reward_model_folder(method.reward_model, job.seed) / "metrics.json").read_text())
    return max(before, int(told["pairs"]))


def _die_with(parent: int) -> None:
    """End this process and its children when its parent is gone: a killed comparison leaves no second writer behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)  # the scheduler gave it a process group of its own

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    """Run the job that the arguments name; 0: done, 2: bad input, said in one sentence on standard error."""
    _die_with(os.getppid())
    path, name, *rest = argv
    try:
        variables = [word for word in rest if word != "--fast"]
        plan = read_plan(Path(path), fast="--fast" in rest, variables=variables)
        jobs = {job.name: job for job in plan_jobs(plan)}
        if name not in jobs:
            raise ConfigError(f"{path}: there is no job {name}.")
        with shown(name):
            do_job(plan, jobs[name])
    except CagsrError as error:
        print(f"cagsr compare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
