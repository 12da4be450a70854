"""The browser set-up never fails a build: it does nothing, installs, or says in one sentence why not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import setup_browser


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Chromium, whose apt-get is ours and does what the file ``script`` says."""
    apt = tmp_path / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n. {tmp_path}/script\n')
    apt.chmod(0o755)
    (tmp_path / "script").write_text("exit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(setup_browser, "CHROMIUM", tmp_path / "chromium")
    monkeypatch.setattr(setup_browser.os, "geteuid", lambda: 0)
    return tmp_path


needs_debian = pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="this is no Debian")


def test_nothing_is_done_where_a_browser_is(debian: Path) -> None:
    (debian / "chromium").touch()
    assert setup_browser.setup() is None
    assert not (debian / "asked").exists()


@needs_debian
def test_it_updates_and_installs_without_recommended_packages(debian: Path) -> None:
    (debian / "script").write_text(f'case "$*" in *install*) touch {debian}/chromium;; esac\n')
    assert setup_browser.setup() == f"installed {debian}/chromium."
    update, install = (debian / "asked").read_text().splitlines()
    assert update.endswith("update")
    assert install.endswith("install --yes --no-install-recommends chromium fonts-dejavu-core")


@needs_debian
def test_a_failing_apt_is_said(debian: Path) -> None:
    (debian / "script").write_text("echo 'E: no network' >&2\nexit 100\n")
    assert setup_browser.setup() == "apt-get update failed (E: no network): the browser tests will be skipped."
    (debian / "script").write_text("exit 0\n")
    assert "still no" in str(setup_browser.setup())


@needs_debian
def test_it_does_not_wait_for_ever(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_browser, "LIMIT", 1)
    (debian / "script").write_text("sleep 60\n")  # a process of apt-get's own
    start = time.monotonic()
    assert "was not done after 1 seconds" in str(setup_browser.setup())
    assert time.monotonic() - start < 30


@needs_debian
def test_it_is_not_silent(debian: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(setup_browser, "BEAT", 0.2)
    (debian / "script").write_text("sleep 1\n")
    setup_browser.setup()
    said = capsys.readouterr().err.splitlines()
    assert "installing chromium fonts-dejavu-core with apt-get" in said[0]
    assert said.count("setup_browser: still at apt-get update.") >= 2
    assert "setup_browser: still at apt-get install." in said


@needs_debian
def test_without_root_it_says_what_root_would_do(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_browser.os, "geteuid", lambda: 1000)
    assert "apt-get install chromium fonts-dejavu-core" in str(setup_browser.setup())
    assert not (debian / "asked").exists()
