"""Install a Chromium for the browser tests where that is ours to do: ``make browser``, which ``make test`` runs first.

Nothing happens where one is there. As root on a Debian (or a relative of it) it comes from the distribution's own packages.
Anywhere else, and where that fails, one sentence says so and the browser tests are skipped; the exit status is always 0.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
PACKAGES = ("chromium", "fonts-dejavu-core")
LIMIT = 240
"""Seconds for all of it."""
BEAT = 30
"""Seconds after which a line says that it goes on."""


def setup() -> str | None:
    """Install the browser if need be; returns what there is to say, None where one was there already."""
    if CHROMIUM.exists():
        return None
    if shutil.which("apt-get") is None or not Path("/etc/debian_version").exists():
        return f"no {CHROMIUM}, and this is no Debian to install it on: the browser tests will be skipped."
    if os.geteuid() != 0:
        return f"no {CHROMIUM}: the browser tests will be skipped (as root: apt-get install {' '.join(PACKAGES)})."
    _say(f"installing {' '.join(PACKAGES)} with apt-get, which may take {LIMIT // 60} minutes.")
    end = time.monotonic() + LIMIT
    for words in (("update",), ("install", "--yes", "--no-install-recommends", *PACKAGES)):
        problem = _apt(words, end - time.monotonic())
        if problem is not None:
            return f"apt-get {words[0]} {problem}: the browser tests will be skipped."
    return f"installed {CHROMIUM}." if CHROMIUM.exists() else f"still no {CHROMIUM}: the browser tests will be skipped."


def _apt(words: tuple[str, ...], seconds: float) -> str | None:
    """Run apt-get quietly; returns what went wrong, None if nothing did."""
    command = [
        "apt-get",
        "-qq",
        "-o",
        "Acquire::Retries=1",
        "-o",
        "Acquire::http::Timeout=20",
        "-o",
        "DPkg::Lock::Timeout=60",
        *words,
    ]
    end = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return f"can't be run ({error.strerror})"
    while True:
        try:
            out, complaints = process.communicate(timeout=max(0.1, min(BEAT, end - time.monotonic())))
            break
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                os.killpg(process.pid, signal.SIGKILL)  # and what apt-get has started
                process.communicate()
                return f"was not done after {LIMIT} seconds"
            _say(f"still at apt-get {words[0]}.")
    if process.returncode == 0:
        return None
    last = (complaints.strip() or out.strip() or "no message").splitlines()[-1]
    return f"failed ({last})"


def _say(sentence: str) -> None:
    print(f"setup_browser: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    said = setup()
    if said is not None:
        _say(said)
