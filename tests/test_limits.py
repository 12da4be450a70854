"""What hangs is a failure that says where, the tests after it still run, and no process is left."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

import apart

ROOT = Path(__file__).parent.parent
HANGING = """
import ctypes, os, pytest, subprocess, sys, time

def waits_for_ever():
    time.sleep(1000)

def hangs_in_c():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)
    for _ in range(2):  # PyDLL keeps the interpreter's lock, as a destructor in C++ does
        library.pthread_mutex_lock(mutex)

@pytest.fixture
def hanging_destructor():
    yield
    hangs_in_c()

def test_waiting():
    waits_for_ever()

def test_holding_the_lock():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    hangs_in_c()

def test_failing_before_its_fixture_hangs(hanging_destructor):
    raise ValueError("first")

def test_after_them():
    pass
"""


def run_pytest(folder: Path, *flags: str) -> tuple[int, str]:
    """Run pytest with pyproject.toml's configuration on a file of tests that hang; exit status and output."""
    (folder / "test_hanging.py").write_text(HANGING)
    environment = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    flags = (
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
        "-p",
        "limits",
        "-p",
        "no:cacheprovider",
        *flags,
    )
    with apart.python("-m", "pytest", str(folder / "test_hanging.py"), *flags, environment=environment) as run:
        return run.wait(120), run.said


def test_a_test_that_hangs_fails_with_its_stack_and_the_others_run(tmp_path: Path) -> None:
    flags = ("--numprocesses", "1", "--override-ini", "timeout=1", "--override-ini", "faulthandler_timeout=2")
    status, said = run_pytest(tmp_path, *flags)
    assert status == pytest.ExitCode.TESTS_FAILED, said
    assert re.search(r"^4 failed, 1 passed", said, re.M), said  # one of them failed, and ended its worker after that
    # The signal: the test's own failure, with the line that waits.
    assert re.search(r"^>\s+time\.sleep\(1000\)\nE\s+Failed: Timeout \(>1\.0s\)", said, re.M), said
    # The last resort, in a test and in what follows a failure: faulthandler's stacks, and xdist names the test.
    assert len(re.findall(r"Timeout \(0:00:02\)!$", said, re.M)) == 2
    for where in ("test_holding_the_lock", "hanging_destructor"):
        assert re.search(
            rf'test_hanging\.py", line \d+ in hangs_in_c\n  File .*test_hanging\.py", line \d+ in {where}\n', said
        )
    for test in ("test_holding_the_lock", "test_failing_before_its_fixture_hangs"):
        assert re.search(rf"worker 'gw\d' crashed while running 'test_hanging\.py::{test}'", said), test
    # What the ended worker could not end is ended, and said.
    (child,) = re.findall(r"left processes behind \(ended now\): (\d+) .*time\.sleep\(1000\)$", said, re.M)
    assert not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"


def test_every_test_has_both_clocks(pytestconfig: pytest.Config) -> None:
    """The process is asked first, then the test fails, then its worker is ended."""
    limit = float(pytestconfig.getini("timeout"))
    assert apart.SECONDS < limit < float(pytestconfig.getini("faulthandler_timeout"))
    assert pytestconfig.getini("timeout_method") == "signal"
    assert pytestconfig.getini("faulthandler_exit_on_timeout")


def sleeps() -> None:
    print("going to sleep", flush=True)
    time.sleep(1000)


def fails() -> None:
    raise ValueError("on purpose")


def rank_of_two() -> int:
    if os.environ["RANK"] == "1":
        return 3
    time.sleep(1000)  # as one that waits for the other
    return 0


def test_a_process_that_hangs_is_ended_with_its_stack() -> None:
    with apart.Process(sleeps) as process:
        process.wait_for("going to sleep")
        with pytest.raises(
            AssertionError, match=r"(?s)not done after 0\.1 seconds:\ngoing to sleep.*line \d+ in sleeps\n"
        ):
            process.wait(0.1)
    assert process.status is not None
    with apart.python("-c", "import time; print('new', flush=True); time.sleep(1000)") as process:
        process.wait_for("new")
        with pytest.raises(AssertionError, match=r"(?s)never wrote 'done'.*new\nFatal Python error: Aborted"):
            process.wait_for("done", 0.1)


def test_a_process_that_fails_says_so_and_ends_the_others() -> None:
    with pytest.raises(AssertionError, match="ValueError: on purpose"):
        apart.call(fails)
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)-6:\n.* in rank_of_two\n.*3:\n"):
        apart.together(2, rank_of_two, grace=1)
    assert time.monotonic() - started < 60


def test_what_a_process_started_is_ended_with_it() -> None:
    """Also in a session of its own, and when the process itself is gone."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '1000'], start_new_session=True); print(p.pid, flush=True)"
    with apart.python("-c", code) as process:
        child = int(process.wait_for(r"\d+\n").group())
        assert process.wait() == 0
        assert Path(f"/proc/{child}").exists()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:  # init takes a moment to bury it
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()
