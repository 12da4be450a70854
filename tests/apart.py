"""What must not run inside pytest: process groups, servers, commands that are killed. Here each is a process that its test ends.

The last reference to a process group or a server may be dropped anywhere, and its destructor joins threads in C++ with the
interpreter's lock held: inside pytest that would be a silence that no signal and no thread of Python's can end.

The processes are forked from one that has imported torch and cagsr already and does nothing else (multiprocessing's
forkserver), so that each costs milliseconds and not the seconds of those imports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

SECONDS = 240.0
"""Patience with a process: less than a test has in all (pyproject.toml), so that the process can still be asked where it is."""
_IMPORTED = (
    *("cagsr.commands.main", "cagsr.train", "cagsr.run_page.live_page", "cagsr.rating.server"),
    *("http.server", "matplotlib.backends.backend_agg", "pytest", "transformers.models.llama.modeling_llama"),
)
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(list(_IMPORTED))


class Process:
    """A process and whatever it starts: its output, its end, and its stacks where it does not end by itself.

    Args:
        work: a function of a module; what it returns is the exit status.
        given: its arguments, pickled.
        environment: variables beside those of this process.
    """

    def __init__(self, work: Callable[..., Any], *given: Any, environment: Mapping[str, str] | None = None) -> None:
        self.mark = f"CAGSR_TEST_{uuid.uuid4().hex}"  # a variable that all it starts inherit
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
        handle, path = tempfile.mkstemp(prefix="cagsr-test-")
        os.close(handle)
        self._output = Path(path)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in own.items():
                patch.setenv(name, value)
            forkserver.ensure_running()  # its libraries read these when they are loaded
        everything = {**os.environ, **own, **(environment or {}), self.mark: "1"}
        asked = pickle.dumps((work, given))  # unpickled where an import that fails is seen
        self._process = _FORKED.Process(target=_begin, args=(path, os.getcwd(), everything, asked))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def sentinel(self) -> int:
        """What ``multiprocessing.connection.wait`` waits for: the end."""
        return self._process.sentinel

    @property
    def status(self) -> int | None:
        """The exit status, minus the signal that killed it; None while it runs."""
        return self._process.exitcode

    @property
    def said(self) -> str:
        """All that it has written to standard output and standard error."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end; returns the exit status.

        Raises:
            AssertionError: it did not end in time; with its output, and where each of its threads stands.
        """
        self._process.join(seconds)
        if (status := self.status) is None:
            raise AssertionError(f"not done after {seconds} seconds:\n{self.stacks()}")
        return status

    def wait_for(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Wait until it has written this.

        Raises:
            AssertionError: it ended before, or did not write it in time.
        """
        end = time.monotonic() + seconds
        while True:
            ended = self.status is not None
            if found := re.search(pattern, self.said):
                return found
            if ended or time.monotonic() > end:
                said = self.said if ended else self.stacks()
                raise AssertionError(f"never wrote {pattern!r} (exit status {self.status}):\n{said}")
            time.sleep(0.02)

    def stacks(self) -> str:
        """Abort it and all that it started; their faulthandlers write where they were behind what they had written."""
        for one in self._family():
            with suppress(psutil.Error):
                one.send_signal(signal.SIGABRT)
        self._process.join(10)
        return re.sub(r"\nExtension modules: .*", "", self.said)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, to it alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> None:
        """End it and all that it started."""
        for one in self._family():
            with suppress(psutil.Error):
                one.kill()
        self._process.join(10)
        self._output.unlink(missing_ok=True)

    def _family(self) -> set[psutil.Process]:
        """It, its process group, and those of its descendants that have left it."""
        found = set(marked(self.mark, group=self.pid))
        if self.status is None:  # where it has not yet come to lead a group
            with suppress(psutil.Error):
                found.add(psutil.Process(self.pid))
        return found  # each once: a second SIGABRT would cut its stacks off

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def marked(variable: str, group: int | None = None) -> list[psutil.Process]:
    """All processes with a variable in the environment they were started with, or of a process group."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if one.status() != psutil.STATUS_ZOMBIE and (os.getpgid(one.pid) == group or variable in one.environ()):
                found.append(one)
    return found


def cagsr(*arguments: Any, environment: Mapping[str, str] | None = None) -> Process:
    """Start a cagsr command."""
    return Process(command, *map(str, arguments), environment=environment)


def python(*arguments: Any, environment: Mapping[str, str] | None = None) -> Process:
    """Start this interpreter anew, with nothing imported: ``python("-m", "torch.distributed.run", ...)``."""
    return Process(_interpreter, *map(str, arguments), environment=environment)


def finish(process: Process, seconds: float = SECONDS) -> str:
    """Wait for a process that must go well, and end what it has left; returns its output."""
    with process:
        assert process.wait(seconds) == 0, process.said[-6000:]
        return process.said


def call(work: Callable[..., Any], *given: Any) -> str:
    """Call a function of a module in a process of its own; returns its output."""
    return finish(Process(work, *given))


def together(count: int, work: Callable[..., Any], *given: Any, grace: float = 20.0, **environment: str) -> list[str]:
    """Call a function in several processes that find each other as torchrun's do (RANK, WORLD_SIZE, MASTER_PORT).

    Args:
        count: how many.
        work: a function of a module.
        given: its arguments.
        grace: seconds that the others have, once one has failed, to end by themselves.
        environment: more variables.

    Returns:
        What each wrote.

    Raises:
        AssertionError: one failed, or they were not done in time; with all their output, and the stacks of those that hung.
    """
    names = environment | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        members = [
            stack.enter_context(Process(work, *given, environment=names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(count)
        ]
        end = time.monotonic() + SECONDS
        while running := [one.sentinel for one in members if one.status is None]:
            if any(one.status for one in members):
                end = min(end, time.monotonic() + grace)
            if not connection.wait(running, max(0.0, end - time.monotonic())):
                break
        outputs = [one.said if one.status is not None else one.stacks() for one in members]
        states = [one.status for one in members]
        assert not any(states), "\n".join(f"{status}:\n{said}" for status, said in zip(states, outputs, strict=True))
        return outputs


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(work: Callable[..., Any], *given: Any) -> Iterator[str]:
    """Run a server, which writes its address; gives the address, and ends the server."""
    with Process(work, *given) as process:
        yield process.wait_for(r"http://\S+(?=\n)").group()


def _begin(output: str, folder: str, environment: dict[str, str], asked: bytes) -> None:
    os.setsid()
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    os.close(handle)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    work, given = pickle.loads(asked)
    sys.exit(work(*given))


def command(*arguments: str) -> int:
    """What a process of ``cagsr`` does."""
    from cagsr.commands.main import main

    return main(list(arguments))


def _interpreter(*arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, *arguments])
