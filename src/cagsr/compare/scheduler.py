"""Run a plan's jobs, several at a time, each in a process of its own; what is done already stays."""

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

from cagsr.compare.jobs import Job
from cagsr.compare.plan import Plan
from cagsr.errors import RunError
from cagsr.support.atomic import disk_errors
from cagsr.support.progress import Task, duration, say, working


@dataclass(frozen=True)
class Failure:
    """A job that failed, with the last line of its log."""

    job: Job
    log: Path
    reason: str


def run_jobs(
    plan: Plan, jobs: Sequence[Job], read_again: Sequence[str], *, parallel: int, threads: int | None = None
) -> list[Failure]:
    """Run every job that is not done, those it needs first, and return what failed; a failure takes those that need it along.

    ``read_again`` is what a job's process reads the plan with: its file, ``--fast``, values of its variables. ``parallel``
    jobs run at a time, with ``threads`` each (None: they share the cores). Raises RunError where another process works on the
    same folder.
    """
    work = plan.folder
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with _lock(work):
        open_jobs = {job.name: job for job in jobs if not job.is_done(plan)}
        # What needs something that is out of date is out of date itself: its fingerprint and its files hold theirs.
        done = len(jobs) - len(open_jobs)
        say(f"{done} of {len(jobs)} jobs are done already; {parallel} at a time.")
        with working("jobs", len(jobs), done=done) as task:
            threads = threads or max(1, (os.cpu_count() or 1) // parallel)
            return _Run(plan, tuple(read_again), parallel, threads, task, {}).all(open_jobs)


@dataclass(frozen=True)
class _Running:
    """A job in its process; ``log_began`` is the size of the log before: what is older is another start's."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    log_began: int
    began: float

    def told(self) -> str:
        """How long it has run, and the last thing it said."""
        with open(self.log, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(self.log_began, size - 2000))
            lines = stream.read().decode("utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{self.job.name} {duration(time.perf_counter() - self.began)}" + (f": {said[:200]}" if said else "")


@dataclass
class _Run:
    plan: Plan
    read_again: tuple[str, ...]
    parallel: int
    threads: int
    task: Task
    running: dict[str, _Running]

    def all(self, waiting: dict[str, Job]) -> list[Failure]:
        self.task.note = lambda: "; ".join(one.told() for one in list(self.running.values()))
        running = self.running
        failures: list[Failure] = []
        lost: set[str] = set()
        try:
            while waiting or running:
                for name, job in list(waiting.items()):  # each behind those that it needs
                    if lost & set(job.needs):
                        lost.add(name)
                        del waiting[name]
                    elif len(running) < self.parallel and not {*waiting, *running} & set(job.needs):
                        running[name] = self._start(waiting.pop(name))
                time.sleep(0.2)
                for name, one in list(running.items()):
                    if one.process.poll() is None:
                        continue
                    del running[name]
                    if one.process.returncode != 0:
                        failures.append(_failure(one))
                        say(f"{name}: failed: {failures[-1].reason}")
                        lost.add(name)
                        continue
                    self.task.advance()
                    say(f"{self.task.counted()} {name}: {duration(time.perf_counter() - one.began)}")
        finally:
            for one in running.values():
                os.killpg(one.process.pid, signal.SIGTERM)
            for one in running.values():
                one.process.wait()
        return failures

    def _start(self, job: Job) -> _Running:
        log = self.plan.folder / "logs" / f"{job.name}.log"
        file, *more = self.read_again
        command = [sys.executable, "-m", "cagsr.compare.worker", file, job.name, *more]
        # Threads that wait for one another on cores shared with another job slow a run down tenfold.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the log tells of the work; its last line is shown
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as stream:
                size, none = stream.tell(), subprocess.DEVNULL
                # A process group of its own, so that its own children end with it.
                process = subprocess.Popen(
                    command, stdin=none, stdout=stream, stderr=stream, env=environment, process_group=0
                )
        return _Running(job, process, log, size, time.perf_counter())


def _failure(one: _Running) -> Failure:
    lines = [line for line in one.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Failure(one.job, one.log, f"exit status {one.process.returncode}: {lines[-1] if lines else 'no output'}")


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
