"""Systems take their steps in turn: each lives in a process of its own and steps only when it is told to.

One process for all would mix up their memory, and TRL's two trainers come from two TRL versions. A system that waits
uses no processor time.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks import bare_checkout, memory
from benchmarks.workload import Work


@dataclass(frozen=True)
class Step:
    """What one step took."""

    seconds: float
    cpu_seconds: float
    """Processor time of all its threads: what other processes take away does not count."""
    tokens: int
    """Response tokens, up to and including the stop token."""
    stages: dict[str, float]
    """Seconds of rollout, scoring and update."""
    idle_mebibytes: float
    """Resident size (on a GPU allocated memory) with nothing but the policy loaded and run once."""
    peak_mebibytes: float | None
    """Highest resident size during the step; only of a step that measures memory."""


class Finished(Exception):
    """No more steps are wanted: raised in the system to leave a trainer's loop."""


class Turns:
    """A system's side: it calls ``begin`` before each step and ``end`` after it."""

    def __init__(self, out: Any, device: str = "cpu") -> None:
        self._out = out
        self._cuda = device == "cuda"
        self._idle = 0.0
        self._stages: dict[str, float] = {}
        self._memory = False
        self._started = self._cpu_started = 0.0

    def policy_is_loaded(self, run: Callable[[], object]) -> None:
        """Note the resident size of the idle model, after ``run`` (a short forward) has touched all of it."""
        run()
        memory.give_back()
        if self._cuda:
            self._idle = torch.cuda.memory_allocated() / 2**20
        else:
            self._idle = memory.resident() if memory.can_measure() else 0.0

    def begin(self) -> None:
        """Wait to be told to step.

        Raises:
            Finished: no more steps are wanted.
        """
        self._out.write("ready\n")
        self._out.flush()
        command = sys.stdin.readline().strip()
        if command not in ("time", "memory"):
            raise Finished
        self._memory = command == "memory"
        self._stages = {}
        if self._memory and self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._memory:
            memory.give_back_at_once()
            memory.reset_peak()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def end(self, tokens: int) -> None:
        """Report the step that ``begin`` started."""
        self._wait()
        seconds, cpu_seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_started
        peak = None
        if self._memory:
            peak = torch.cuda.max_memory_allocated() / 2**20 if self._cuda else memory.peak()
        self._out.write(json.dumps(asdict(Step(seconds, cpu_seconds, tokens, self._stages, self._idle, peak))) + "\n")
        self._out.flush()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a stage of this step."""
        self._wait()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.add(name, time.perf_counter() - started)

    def seconds(self, name: str) -> float:
        """Seconds of a stage in this step so far."""
        return self._stages[name]

    def elapsed(self) -> float:
        """Seconds since the step began."""
        self._wait()
        return time.perf_counter() - self._started

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage of this step."""
        self._stages[name] = self._stages.get(name, 0.0) + seconds

    def _wait(self) -> None:
        """Until the GPU, if there is one, has done what it was asked for."""
        if self._cuda:
            torch.cuda.synchronize()


class System:
    """The benchmark's side: a process that runs ``benchmarks.systems.<module>``.

    Args:
        module: which system.
        work: its work.
        folder: the starting model and the prompts.
        threads: CPU threads.
        options: handed to the system's ``run``.
    """

    def __init__(self, module: str, work: Work, folder: Path, threads: int, **options: str) -> None:
        self.module = module
        self._work = work
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.turns",
                module,
                json.dumps(asdict(work)),
                str(folder),
                json.dumps(options),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self._expect()

    def step(self, *, measure_memory: bool = False) -> Step:
        """Take one step.

        Raises:
            RuntimeError: the system stopped, or it did not sample all that the work asks for.
        """
        self._tell("memory" if measure_memory else "time")
        step = Step(**json.loads(self._expect()))
        wanted = self._work.sequences * self._work.response
        if step.tokens != wanted and not self._work.varied:
            raise RuntimeError(
                f"{self.module} sampled {step.tokens} tokens where the work is {wanted}: not equal work."
            )
        self._expect()  # it waits for its next turn
        return step

    def __enter__(self) -> System:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _expect(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise self._failure()

    def _failure(self) -> RuntimeError:
        self._process.wait()
        self._log.seek(0)
        return RuntimeError(f"{self.module} stopped by itself: {self._log.read().strip()[-3000:]}")


def _main(module: str, work: Work, folder: Path, options: dict[str, str]) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Libraries print to standard output, which here is the line to the benchmark.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            importlib.import_module(f"benchmarks.systems.{module}").run(
                work, folder, Turns(out, work.device), **options
            )
        except Finished:
            return


if __name__ == "__main__":
    bare_checkout.prepare()
    # Through its import name, so that there is one ``Finished`` and not two.
    from benchmarks.turns import _main as run_system

    run_system(sys.argv[1], Work(**json.loads(sys.argv[2])), Path(sys.argv[3]), json.loads(sys.argv[4]))
