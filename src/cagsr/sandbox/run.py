"""Run untrusted Python in a process of its own that can compute, and write into an empty folder, and nothing else.

What the kernel gives is taken, by the process itself before it runs anything (``confine.py``): Landlock for files, a seccomp
filter for processes, signals and sockets, network namespaces, limits; bubblewrap around all of it where it is installed.
:func:`protection` says which are in force. Where files, network and other processes are not all protected, code is refused.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from annotated_types import Gt

from cagsr.config.ranges import PositiveFloat, PositiveInt
from cagsr.errors import ConfigError

CONFINE = Path(__file__).with_name("confine.py")
NEEDED = {
    "files": ("bubblewrap", "Landlock"),
    "network": ("bubblewrap", "namespaces", "seccomp"),
    "other processes": ("bubblewrap", "seccomp"),
}
"""What must be protected, each by one of these at least."""
LANDLOCK = 7
"""The newest version of Landlock's interface that is asked for; tests ask for older ones."""
LOOK_EVERY = 0.02
"""Seconds between two looks at a running program and its folder."""
MOST_FILES, MOST_DEPTH, MOST_THREADS = 1000, 30, 100
"""Of a program: files and folders, folders within each other, threads."""
REFUSED = 97
"""Exit status of a program that was not run because a protection is missing."""


@dataclass(frozen=True)
class SandboxConfig:
    """What a program of the model's may use up."""

    seconds: PositiveFloat = 5.0
    """Longest time it may take, by the clock and by the processor."""
    memory: Annotated[float, Gt(0.1)] = 1.0
    """Largest address space, GiB."""
    output_kilobytes: PositiveInt = 64
    """Largest file it may write, its output included, kB; its folder may hold 16 times as much."""
    at_once: PositiveInt = 2
    """Programs that run at the same time."""
    unprotected: bool = False
    """Run it also where the machine can't protect files, network and other processes. Only inside a container or a virtual machine
    that may be lost."""


Kind = Literal["passed", "failed", "timed out", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    kind: Kind
    """passed: it ran to its end; failed: it did not (an exception, a failed assertion, an early exit); timed out, or stopped
    because it wrote too much."""
    output: str
    """The end of what it wrote to standard output and error, the traceback of an exception included."""
    seconds: float


@cache
def protection() -> tuple[str, ...]:
    """The names of the protections that this machine gives; tried once, with a program that does nothing."""
    config = SandboxConfig(seconds=20.0, unprotected=True)
    with _folder() as folder:
        _, taken, _ = _start("pass", config, folder, ())
    return taken


def unprotected(taken: Sequence[str]) -> list[str]:
    """What of files, network and other processes these protections leave open."""
    return [what for what, names in NEEDED.items() if not set(names) & set(taken)]


def check_protection(config: SandboxConfig, setting: str) -> str:
    """A sentence on the protection in force; ConfigError where one is missing and ``unprotected`` isn't set, by ``setting``."""
    taken = protection()
    if missing := unprotected(taken):
        if not config.unprotected:
            raise ConfigError(
                f"code of the model's can't be run safely here: nothing protects {' and '.join(missing)} (in force: "
                f"{', '.join(taken) or 'nothing'}). Install bubblewrap, use a Linux with Landlock and seccomp, or, in a container "
                f"that may be lost, give {setting}."
            )
        return f"Code of the model's runs WITHOUT protection of {' and '.join(missing)} ({setting}); in force: {', '.join(taken)}."
    return f"Code of the model's runs under {', '.join(taken)}: {config.seconds:g} s, {config.memory:g} GiB."


def run_programs(programs: Sequence[str], config: SandboxConfig) -> list[Outcome]:
    """Run programs, ``at_once`` at a time, each from nothing in an empty folder that is removed afterwards.

    What stands among them more than once, as a model's answers to one prompt often do, is run once.
    """
    different = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(config.at_once) as pool:
        outcomes = dict(zip(different, pool.map(lambda one: run_program(one, config), different), strict=True))
    return [outcomes[one] for one in programs]


def run_program(program: str, config: SandboxConfig) -> Outcome:
    """Run one Python program under :func:`protection`; ConfigError where there is too little and ``unprotected`` isn't set."""
    check_protection(config, "unprotected")
    needed = () if config.unprotected else tuple(NEEDED.values())
    with _folder() as folder:
        outcome, _, status = _start(program, config, folder, needed)
    if status == REFUSED:
        raise ConfigError("a protection that was there is gone, so the model's code was not run")
    return outcome


def _start(
    program: str, config: SandboxConfig, folder: Path, needed: Sequence[Sequence[str]]
) -> tuple[Outcome, tuple[str, ...], int]:
    """Start, watch and end a program; gives what became of it, the protections it had, and its exit status."""
    inside = folder / "work"
    inside.mkdir()
    bubblewrap = _bubblewrap(inside)
    most = config.output_kilobytes * 1000
    job: dict[str, Any] = {
        "program": program,
        "folder": str(inside),
        "readable": _readable(),
        "cpu_seconds": max(1, round(config.seconds)),
        "memory_bytes": int(config.memory * 2**30),
        "file_bytes": most,
        "needed": [] if bubblewrap else [list(one) for one in needed],
        "done": secrets.token_hex(8),
        "landlock": LANDLOCK,
    }
    reading, writing = os.pipe()
    started = time.monotonic()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*bubblewrap, sys.executable, "-I", "-S", str(CONFINE)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=inside,
            env={
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "PYTHONDONTWRITEBYTECODE": "1",
                "CAGSR_REPORT": str(writing),
            },
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died early: the exit status says so
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            kind = _watched(process, inside, started + config.seconds, 16 * most)
        finally:
            _end(process)
    with os.fdopen(reading, "rb") as report:
        said, _, end = report.read(4096).decode(errors="replace").partition("\n")
    taken = (*(("bubblewrap",) if bubblewrap else ()), *(json.loads(said) if said else ()))
    status = process.returncode
    if kind == "passed" and (status != 0 or end != job["done"]):
        # Killed by the kernel for its processor time; else it failed by itself.
        kind = "timed out" if status in (-signal.SIGXCPU, -signal.SIGKILL) else "failed"
    text = _tail(folder / "output", most)
    return Outcome(kind, text, time.monotonic() - started), taken, status


def _watched(process: subprocess.Popen[bytes], folder: Path, deadline: float, most: int) -> Kind:
    """Wait for the end, the deadline, or a folder that holds too much."""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return "timed out"
        if _holds_more_than(folder, most) or _threads(process.pid) > MOST_THREADS:
            return "stopped"
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_EVERY)
    return "passed"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program with all that it has started."""
    with suppress(psutil.NoSuchProcess):
        whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in whole:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _holds_more_than(folder: Path, most: int) -> bool:
    """Whether there are too many bytes, files or folders, or such as can't be looked at."""
    size = count = 0
    left = [(str(folder), 0)]
    while left:
        here, depth = left.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    count += 1
                    is_folder = entry.is_dir(follow_symlinks=False)
                    with suppress(FileNotFoundError):  # it was there a moment ago
                        size += 0 if is_folder else entry.stat(follow_symlinks=False).st_size
                    if is_folder:
                        left.append((entry.path, depth + 1))
                    if size > most or count > MOST_FILES or depth > MOST_DEPTH:
                        return True
        except FileNotFoundError:
            continue
        except OSError:  # a name that is too long, a folder that may not be read
            return True
    return False


def _threads(process: int) -> int:
    try:
        return psutil.Process(process).num_threads()
    except psutil.Error:
        return 0


@contextmanager
def _folder() -> Iterator[Path]:
    """A new folder, removed afterwards whatever a program has made of it (folders within each other, or without rights)."""
    folder = Path(tempfile.mkdtemp(prefix="cagsr-sandbox-"))
    try:
        yield folder
    finally:
        # Python's own rmtree is recursive; rm is not, and is as quick.
        subprocess.run(["chmod", "-R", "u+rwx", "--", str(folder)], capture_output=True, check=False)
        subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True, check=False)


def _tail(path: Path, most: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode(errors="replace")


@cache
def _readable() -> list[str]:
    """What the interpreter needs to read: itself and its library, the system's, nobody's files."""
    own = {Path(sys.executable).resolve().parent.parent, Path(sys.base_prefix), CONFINE}
    system = {Path(path) for path in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")}
    return sorted(str(path) for path in own | system if path.exists())


def _bubblewrap(folder: Path) -> list[str]:
    """What goes before a program where bubblewrap works: namespaces of its own, everything but ``folder`` unwritable."""
    found = _working_bubblewrap()
    if found is None:
        return []
    readable = [part for path in [*_readable(), sys.prefix] for part in ("--ro-bind-try", path, path)]
    return [
        *(found, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *readable,
        *(
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--tmpfs",
            "/tmp",
            "--bind",
            str(folder),
            str(folder),
            "--chdir",
            str(folder),
        ),
        "--",
    ]


@cache
def _working_bubblewrap() -> str | None:
    found = shutil.which("bwrap")
    if found is None:
        return None
    tried = subprocess.run([found, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, check=False)
    return found if tried.returncode == 0 else None
