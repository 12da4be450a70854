"""Programs that mean harm leave the machine as it was, and cost their time limit at most."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from cagsr.errors import ConfigError
from cagsr.sandbox import run
from cagsr.sandbox.run import (
    Outcome,
    SandboxConfig,
    check_protection,
    protection,
    run_program,
    run_programs,
    unprotected,
)

QUICK = SandboxConfig(seconds=1.0, memory=0.5, output_kilobytes=50)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the protections are Linux's")


@pytest.fixture(autouse=True)
def protected() -> None:
    if missing := unprotected(protection()):
        pytest.skip(f"this machine protects no {missing}")


def ran(program: str) -> Outcome:
    """Run it; nothing of it may be left, and it may take its time and a second to begin and end on a busy machine."""
    before = {one.pid for one in psutil.process_iter()}
    outcome = run_program(program, QUICK)
    assert outcome.seconds < QUICK.seconds + 3
    time.sleep(0.05)
    left = [
        one for one in psutil.Process().children(recursive=True) if one.pid not in before and one.status() != "zombie"
    ]
    assert left == []
    return outcome


def test_harmless_programs_run():
    said = ran("import math, re, json, collections, itertools, random\nprint(math.factorial(20))")
    assert (said.kind, said.output) == ("passed", "2432902008176640000\n")
    assert ran("open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'").kind == "passed"
    assert (
        ran("import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()").output == "hi\n"
    )
    assert ran("assert __name__ == '__main__'").kind == "passed"


def test_what_went_wrong_is_told_as_python_tells_it():
    said = ran("def f(x):\n    return 1 / x\nf(0)")
    assert said.kind == "failed"
    assert said.output.splitlines() == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
        '  File "program.py", line 2, in f',
        "ZeroDivisionError: division by zero",
    ]
    assert "SyntaxError" in ran("def f(:").output
    assert "confine" not in ran("def f(:").output


@pytest.mark.parametrize("program", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "exit()"])
def test_a_program_that_leaves_early_has_not_passed(program: str):
    assert ran(program + "\nassert False").kind == "failed"


HOSTILE = {
    "endless": ("while True: pass", "timed out"),
    "asleep": ("import time\ntime.sleep(1000)", "timed out"),
    "deaf": ("import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)", "timed out"),
    "fork bomb": ("import os\nwhile True: os.fork()", "failed"),
    "fork bomb that goes on": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timed out"),
    "thread bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", None
    ),
    "10 GB": ("x = bytearray(10 * 2**30)", "failed"),
    "memory by and by": ("x = []\nwhile True: x.append(bytearray(10**7))", "failed"),
    "a million lines": ("for n in range(10**6): print('line', n)", "failed"),
    "a large file": ("f = open('x', 'wb')\nfor n in range(10**4): f.write(b'x' * 10**5)", "failed"),
    "many files": ("n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 40000)\n    n += 1", "stopped"),
    "many empty files": ("n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1", "stopped"),
    "a shell": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo'])", "failed"),
    "another program": ("import os\nos.execv('/bin/ls', ['ls'])", "failed"),
    "killing its parent": ("import os\nos.kill(os.getppid(), 9)", "failed"),
    "killing everybody": ("import os\nos.kill(-1, 9)", "failed"),
    "tracing its parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.ptrace(16, os.getppid(), 0, 0) == 0", "failed"
    ),
    "its parent's limits": ("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "failed"),
    "a socket": ("import socket\nsocket.socket()", "failed"),
    "a download": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:80', timeout=1)", "failed"),
    "crash": ("import ctypes\nctypes.string_at(0)", "failed"),
    "abort": ("import os\nos.abort()", "failed"),
    "deep": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
    "users' files": ("print(open('/etc/passwd').read())", "failed"),
    "its parent's environment": ("import os\nprint(open(f'/proc/{os.getppid()}/environ').read())", "failed"),
    "mounts": ("import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0", "failed"),
    "a user of its own": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "failed"),
    "no filter": ("import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) >= 0", "failed"),  # io_uring
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_harms_nobody(name: str):
    program, kind = HOSTILE[name]
    outcome = ran(program)
    assert outcome.kind != "passed"
    assert kind is None or outcome.kind == kind, outcome.output
    assert len(outcome.output) <= QUICK.output_kilobytes * 1000
    assert psutil.Process().is_running()


@pytest.mark.parametrize(
    "harm",
    [
        "open({path!r}, 'w').write('x')",
        "open({path!r}, 'a').write('x')",
        "open({path!r}).read()",
        "import os\nos.remove({path!r})",
        "import os\nos.rename({path!r}, 'mine')",
        "import os\nos.link({path!r}, 'mine')",
        "import os\nos.truncate({path!r}, 0)",
        "import os\nos.chmod({path!r}, 0)",
        "import os\nos.chown({path!r}, 1, 1)",
        "import os\nos.utime({path!r}, (1, 1))",
        "import os\nos.setxattr({path!r}, 'user.x', b'x')",
        "import os\nos.symlink({path!r}, 'there')\nopen('there', 'w').write('x')",
        "import os\nos.mkdir({path!r} + '-more')",
        "import os, shutil\nshutil.rmtree(os.path.dirname({path!r}))",
        "import os\nos.mkfifo({path!r} + '-pipe')",
        "import os\nfd = os.open('..', os.O_RDONLY)\nos.mkdir('more', dir_fd=fd)",
    ],
)
def test_nothing_outside_its_folder_is_touched(harm: str, tmp_path: Path):
    path = tmp_path / "precious"
    path.write_text("here")
    before = os.stat(path)
    assert ran(harm.format(path=str(path))).kind == "failed"
    after = os.stat(path)
    assert path.read_text() == "here"
    same = ("st_mode", "st_uid", "st_nlink", "st_mtime_ns", "st_size")
    assert [getattr(after, one) for one in same] == [getattr(before, one) for one in same]
    assert [one.name for one in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("landlock", [1, 2, 3, 5])
def test_older_kernels_leave_nothing_open_that_counts_as_protected(
    landlock: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Truncating is Landlock's from version 3 on, signals to others from 6: the filter refuses both."""
    monkeypatch.setattr(run, "LANDLOCK", landlock)
    path = tmp_path / "precious"
    path.write_text("here")
    assert ran(f"import os\nos.truncate({str(path)!r}, 0)").kind == "failed"
    assert ran(f"import os\nos.chmod({str(path)!r}, 0)").kind == "failed"
    assert path.read_text() == "here"
    owner = "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, {command}, {value})"
    assert ran(owner.format(command=8, value=os.getpid())).kind == "failed"
    assert ran(owner.format(command=15, value="b'\\0' * 8")).kind == "failed"
    assert ran("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 1)").kind == "passed"
    assert ran("import os\nos.memfd_create('x')").kind == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    os.mkdir('a')\n    os.chdir('a')",
        "import os\nn = 0\nwhile True:\n    os.mkdir(str(n))\n    n += 1",
        "import os, time\nos.mkdir('a', 0o300)\nwhile True:\n    time.sleep(0.01)",
        "import os\nfor n in range(20):\n    os.mkdir('x' * 250)\n    os.chdir('x' * 250)\nimport time\ntime.sleep(9)",
    ],
)
def test_whatever_a_folder_has_become_it_is_gone_soon(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    before = time.monotonic()
    assert ran(program).kind in ("stopped", "failed", "timed out")
    assert time.monotonic() - before < QUICK.seconds + 6
    assert list(tmp_path.iterdir()) == []


def test_it_is_told_nothing_of_who_runs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    said = ran("import os\nprint(sorted(os.environ), os.listdir('.'))").output
    assert said == "['LANG', 'PATH', 'PYTHONDONTWRITEBYTECODE'] []\n"


def test_programs_run_side_by_side_and_keep_their_order():
    config = SandboxConfig(seconds=5.0, at_once=4)
    found = run_programs([f"print({n})\nassert {n} % 2 == 0" for n in range(6)], config)
    assert [one.output.split()[0] for one in found] == list("012345")
    assert [one.kind for one in found] == ["passed", "failed"] * 3


def test_the_same_program_is_run_once(monkeypatch: pytest.MonkeyPatch):
    ran_now: list[str] = []

    def noted(program: str, config: SandboxConfig) -> run.Outcome:
        ran_now.append(program)
        return run.Outcome("passed", program, 0.0)

    monkeypatch.setattr(run, "run_program", noted)
    found = run_programs(["a", "b", "a", "a", "b"], SandboxConfig(at_once=1))
    assert [one.output for one in found] == ["a", "b", "a", "a", "b"]
    assert ran_now == ["a", "b"]


def test_without_protection_code_is_refused_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch):
    assert "namespaces" not in unprotected(protection())
    assert check_protection(QUICK, "--x").startswith("Code of the model's runs under ")
    monkeypatch.setattr(run, "protection", lambda: ("limits", "namespaces"))
    with pytest.raises(
        ConfigError, match=r"nothing protects files and other processes \(in force: limits, namespaces\).*--x"
    ):
        check_protection(QUICK, "--x")
    with pytest.raises(ConfigError, match="nothing protects"):
        run_program("print(1)", QUICK)
    free = SandboxConfig(unprotected=True)
    assert "WITHOUT protection of files and other processes" in check_protection(free, "--x")
    assert run_program("print(1)", free).output == "1\n"


def test_a_protection_that_is_gone_is_noticed_before_the_program_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "NEEDED", {**run.NEEDED, "time": ("a time machine",)})
    monkeypatch.setattr(run, "protection", lambda: ("bubblewrap", "a time machine"))
    with pytest.raises(ConfigError, match="was not run"):
        run_program("print(1)", QUICK)
