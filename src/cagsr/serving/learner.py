"""When a new version is trained: a thread that watches for idle time, and over the process that trains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cagsr.errors import CagsrError
from cagsr.serving.activity import Activity
from cagsr.serving.job import FOLDER, Job, JobFolder
from cagsr.serving.prompt_store import PromptStore
from cagsr.serving.settings import ServeConfig
from cagsr.serving.versions import Versions
from cagsr.support.progress import say

POLL = 0.1
"""Seconds between looks."""
FEWEST = 4
"""Prompts without which no comparison is made, and so no training."""
REST = 60.0
"""Seconds without a new attempt after a training has failed, or there was nothing to compare versions on."""
GRACE = 60.0
"""Seconds beyond the budget, and beyond it once more, that a training may take to finish what it has."""


class Learner:
    """Trains when nobody asks, within the budget; one training at a time, whose process it starts, pauses and ends."""

    def __init__(
        self,
        config: ServeConfig,
        folder: Path,
        store: PromptStore,
        versions: Versions,
        activity: Activity,
        held_out: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """``held_out``: rows that versions are compared on; None: those of the kept prompts that are never trained on."""
        self._config, self._folder, self._store = config, folder, store
        self._versions, self._activity, self._held_out = versions, activity, held_out
        self._job = JobFolder(folder / FOLDER)
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = self._ending = False
        self._worked, self._looked = 0.0, time.monotonic()
        self._rests_until = self._looked
        self._last: dict[str, Any] = {}
        self._lacks = "idle time"
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cagsr-learner", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._config.learning.enabled:
            self._thread.start()

    def close(self) -> None:
        """End a training's process; the next server goes on with it."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._kill()

    def status(self) -> Mapping[str, Any]:
        """What it does, and what came of the last training."""
        state = "off" if not self._config.learning.enabled else "waiting"
        if self._process is not None:
            state = "paused" if self._paused else "training"
        waits = {"for": self._lacks} if state == "waiting" else {}
        return {"state": state, **waits, "seconds": round(self._worked, 1), "last": self._last}

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            with self._lock:
                try:
                    self._look()
                except (CagsrError, OSError, psutil.Error) as error:
                    with suppress(CagsrError, OSError):  # it was told, and is tried again after a rest
                        self._give_up(str(error))

    def _look(self) -> None:
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        job = self._job.job()
        if job is not None and self._store.removed(job.trained) != job.removed:
            # It may have read a prompt that somebody has removed since: all that it has made goes too.
            self._kill()
            shutil.rmtree(self._job.path)
        if self._process is None:
            if now >= self._rests_until and self._activity.idle() >= self._config.learning.idle_seconds:
                self._lacks = "idle time"
                self._begin()
            return
        if not self._paused:
            self._worked += passed
        if (status := self._process.poll()) is not None:
            self._process = None
            self._ended(status)
            return
        self._pace()
        self._hold_to_budget()

    def _begin(self) -> None:
        """Start the process of a training: one that an earlier process has left, or a new one if there is enough to learn."""
        if self._job.job() is None:
            learning, manifest = self._config.learning, self._versions.manifest()
            counts = self._store.counts(manifest.trained)
            if counts["new"] < learning.new_prompts:
                self._lacks = f"{learning.new_prompts - counts['new']:,} more prompts"
                return
            kept = self._store.prompts()
            own = [{"prompt": one.prompt} for one in kept if one.held_out]
            held_out = (own if self._held_out is None else list(self._held_out))[-learning.held_out_prompts :]
            if len(held_out) < FEWEST:
                self._lacks = f"{FEWEST - len(held_out)} more prompts to compare versions on"
                self._rests_until = time.monotonic() + REST
                return
            last = counts["last"]
            job = Job(manifest.next, manifest.current, last, self._store.removed(last))
            self._job.begin(job, self._config, [one for one in kept if not one.held_out], held_out)
            self._worked = 0.0
        threads = {name: str(self._config.learning.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with open(self._job.said, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cagsr.serving.training_process", str(self._folder), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, **threads},
                process_group=0,  # Ctrl-C is the server's
            )
        self._paused = self._ending = False
        psutil.Process(self._process.pid).nice(min(19, psutil.Process().nice() + self._config.learning.nice))

    def _pace(self) -> None:
        """Pause while requests come, go on when they have stopped for a while."""
        if self._config.learning.when_busy == "nice" or self._ending:
            return
        idle = self._activity.idle()
        if not self._paused and idle == 0:
            self._signal(signal.SIGSTOP)
            self._paused = True
        elif self._paused and idle >= self._config.learning.idle_seconds:
            self._signal(signal.SIGCONT)
            self._paused = False

    def _hold_to_budget(self) -> None:
        learning, process = self._config.learning, self._process
        assert process is not None
        try:
            used = psutil.Process(process.pid).memory_info().rss
        except psutil.Error:
            return  # it has just ended
        if used > learning.memory_mb * 2**20:
            self._give_up(f"It took more than {learning.memory_mb:,} MiB (--learning.memory_mb).")
        elif self._worked > 2 * learning.seconds + GRACE:
            self._give_up(f"It was not done long after {learning.seconds:g} seconds (--learning.seconds).")
        elif self._worked > learning.seconds and not self._ending:
            self._ending = True
            self._signal(signal.SIGINT)

    def _ended(self, status: int) -> None:
        """Take in what a process has made."""
        job, verdict = self._job.job(), self._job.verdict()
        assert job is not None
        if verdict is None:
            said = self._job.said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self._give_up(f"The training ended with status {status}: {said[-1][:500] if said else 'it said nothing'}")
            return
        accepted = bool(verdict["accepted"])
        run = self._job.run if accepted else None
        self._versions.add(job.number, run, verdict, parent=job.parent, trained=job.trained)
        shutil.rmtree(self._job.path)
        self._last = {"version": job.number, "accepted": accepted, "reasons": verdict["reasons"]}
        if not accepted:
            say(f"Version {job.number} was not put in place: {' '.join(verdict['reasons'])}")
        elif self._versions.manifest().current == job.number:
            say(f"Version {job.number} serves now.")
        else:
            say(f"Version {job.number} can be asked for; another one was chosen while it was trained.")

    def _give_up(self, reason: str) -> None:
        """End a training that came to nothing; the next one waits for new prompts."""
        self._last, self._rests_until = {"accepted": False, "failed": reason}, time.monotonic() + REST
        say("A training failed; GET /cagsr/status says why.")  # its text may quote a prompt
        self._kill()
        if (job := self._job.job()) is not None:
            self._versions.tried(job.trained)
            shutil.rmtree(self._job.path)

    def _kill(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process, self._paused = None, False

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(self._process.pid, number)
