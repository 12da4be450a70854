"""Run a plan's jobs, several at a time, each in a process of its own; what is done already stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cagsr.atomic import disk_errors
from cagsr.compare.jobs import Job
from cagsr.compare.plan import Plan
from cagsr.errors import RunError


@dataclass(frozen=True)
class Failure:
    """A job that failed."""

    job: Job
    log: Path
    """Its whole output."""
    reason: str
    """The last line of it."""


def run_jobs(
    plan: Plan, plan_file: Path, jobs: Sequence[Job], *, fast: bool, parallel: int, console: Console
) -> list[Failure]:
    """Run every job that is not done, those it needs first.

    A job that fails takes those that need it with it; the others go on, so that a night is not lost.

    Args:
        plan: the comparison.
        plan_file: its file, which the jobs read again.
        jobs: all of them.
        fast: the plan's fast version.
        parallel: jobs at a time; the cores are shared among them.
        console: where to say what goes on.

    Returns:
        What failed.

    Raises:
        RunError: another process works on the same folder.
    """
    work = plan.folder
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with _lock(work):
        open_jobs = {job.name: job for job in jobs if not job.is_done(plan)}
        # What needs something that is out of date is out of date itself: its fingerprint and its files hold theirs.
        console.print(f"{len(jobs) - len(open_jobs)} of {len(jobs)} jobs are done already; {parallel} at a time.")
        return _Run(plan, plan_file, fast, parallel, console, len(jobs)).all(open_jobs)


class _Run:
    def __init__(self, plan: Plan, plan_file: Path, fast: bool, parallel: int, console: Console, total: int) -> None:
        self._plan = plan
        self._plan_file = plan_file
        self._fast = fast
        self._parallel = parallel
        self._console = console
        self._total = total

    def all(self, waiting: dict[str, Job]) -> list[Failure]:
        done = self._total - len(waiting)
        running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
        failures: list[Failure] = []
        durations: list[float] = []
        bar = Progress(
            TextColumn("jobs"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        try:
            with bar:
                task = bar.add_task("jobs", total=self._total, completed=done, left="")
                while waiting or running:
                    for name in [name for name, job in waiting.items() if self._ready(job, waiting, running)]:
                        if len(running) == self._parallel:
                            break
                        job = waiting.pop(name)
                        running[name] = (job, self._start(job), time.perf_counter())
                    if not running:
                        break  # what is left needs something that failed
                    time.sleep(0.2)
                    for name, (job, process, began) in list(running.items()):
                        if process.poll() is None:
                            continue
                        del running[name]
                        seconds = time.perf_counter() - began
                        if process.returncode != 0:
                            failures.append(self._failure(job, process.returncode))
                            self._console.print(f"{name}: failed: {failures[-1].reason}", markup=False)
                            self._drop(job, waiting)
                            continue
                        done += 1
                        durations.append(seconds)
                        left = self._left(durations, len(waiting) + len(running))
                        bar.update(task, completed=done, left=left)
                        if not self._console.is_terminal:
                            self._console.print(f"{done}/{self._total} {name}: {seconds:.0f} s; {left}", markup=False)
        finally:
            for _, process, _ in running.values():
                os.killpg(process.pid, signal.SIGTERM)
            for _, process, _ in running.values():
                process.wait()
        return failures

    def _ready(
        self, job: Job, waiting: dict[str, Job], running: dict[str, tuple[Job, subprocess.Popen[bytes], float]]
    ) -> bool:
        return not any(need in waiting or need in running for need in job.needs)

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        log = self._log(job)
        command = [sys.executable, "-m", "cagsr.compare.work", str(self._plan_file), job.name]
        command += ["--fast"] if self._fast else []
        # Threads that wait for one another on cores shared with another job slow a run down tenfold.
        threads = str(max(1, (os.cpu_count() or 1) // self._parallel))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as stream:
                return subprocess.Popen(
                    command,
                    stdout=stream,
                    stderr=stream,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    process_group=0,  # so that its own children end with it
                )

    def _log(self, job: Job) -> Path:
        return self._plan.folder / "logs" / f"{job.name}.log"

    def _failure(self, job: Job, status: int) -> Failure:
        log = self._log(job)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Failure(job, log, f"exit status {status}: {lines[-1] if lines else 'no output'}")

    def _drop(self, failed: Job, waiting: dict[str, Job]) -> None:
        lost = {failed.name}
        while True:
            more = {name for name, job in waiting.items() if lost & set(job.needs)} - lost
            if not more:
                break
            lost |= more
        for name in lost & set(waiting):
            del waiting[name]

    def _left(self, durations: list[float], jobs: int) -> str:
        recent = durations[-20:]
        minutes = sum(recent) / len(recent) * jobs / self._parallel / 60
        return f"about {minutes:.0f} min left" if jobs else "done"


@contextmanager
def _lock(work: Path) -> Iterator[None]:
    with disk_errors(work), open(work / "compare.lock", "a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another cagsr compare works in {work}: wait for it, or give the plan another 'work'."
            ) from error
        yield
