"""A run of the tests ends, whatever hangs, says where it hung, and leaves no process behind.

pyproject.toml sets two clocks on each test. pytest-timeout's is a signal: the test fails with its stack, and the others go
on. But a signal is handled by the interpreter, which a hang in C with the interpreter's lock held never comes back to, and a
thread (the plugin's other method) waits for that lock too. So a minute later faulthandler, which needs no lock, writes all
stacks and ends the process; xdist then counts the test as failed and goes on with another worker.

Here are the moments that those clocks leave out, and the processes.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import psutil
import pytest

from apart import marked

MARK = f"CAGSR_TESTS_{os.getpid()}"
_STDERR = pytest.StashKey[int]()


@contextmanager
def last_resort(config: pytest.Config, more: float = 0.0) -> Generator[None]:
    """End this process, with its stacks, where the block takes as long as a test must not, and ``more`` seconds."""
    seconds = float(config.getini("faulthandler_timeout")) + more
    faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[_STDERR])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    with last_resort(session.config):  # imports can hang too
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    own = item.get_closest_marker("timeout")  # a test that is allowed more
    more = max(0.0, own.args[0] - float(item.config.getini("timeout"))) if own is not None else 0.0
    with last_resort(item.config, more):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    # Both clocks stop when a test fails, for a debugger's sake; its fixtures are still there.
    with last_resort(item.config):
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # the real one: later what is written to 2 is captured
    if not hasattr(config, "workerinput"):  # not in xdist's workers, which inherit it as everything else does
        os.environ[MARK] = "1"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if MARK in os.environ:
        os.environ.pop(MARK)
        if left := _left_behind(min(10.0, float(session.config.getini("timeout")))):
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
            print(f"\nThe tests left processes behind (ended now): {'; '.join(left)}", file=sys.stderr)
    # Nothing cancels this one: what hangs may be a destructor or a thread at the interpreter's end.
    faulthandler.dump_traceback_later(60, exit=True, file=session.config.stash[_STDERR])


def _left_behind(patience: float) -> list[str]:
    """End the processes of this run's tests that have not ended by themselves; returns their commands.

    A worker that faulthandler ended could not end its test's processes. A browser's take a moment.
    """
    end = time.monotonic() + patience
    while (left := [one for one in marked(MARK) if not _of_multiprocessing(one)]) and time.monotonic() < end:
        time.sleep(0.1)
    said = []
    for one in left:
        try:
            said.append(f"{one.pid} {' '.join(one.cmdline())[:200]}")
            one.kill()
        except psutil.Error:
            continue
    return said


def _of_multiprocessing(process: psutil.Process) -> bool:
    """Whether it is a forkserver or a resource tracker, which end with the process that they serve.

    What is forked from a forkserver has its command line, but leads a session (tests/apart.py).
    """
    try:
        return "multiprocessing" in " ".join(process.cmdline()) and os.getsid(process.pid) != process.pid
    except (psutil.Error, OSError):
        return True  # it has ended
