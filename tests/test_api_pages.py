"""The API's pages: made by the command, of all that is public, without a dead link, and each to be reached from the first."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import apart
import cagsr
from links import dead_links, reached

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_the_pages_of_the_public_modules(tmp_path: Path) -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.installed", "api"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    [command] = [line for line in shown.stdout.splitlines() if "-m pdoc" in line]
    arguments = [str(tmp_path) if word == "build/api" else word for word in shlex.split(command)[1:]]
    apart.finish(apart.python(*arguments))
    assert dead_links(tmp_path) == []
    pages = {path.resolve() for path in tmp_path.rglob("*.html")}
    assert reached(tmp_path / "index.html") == pages
    assert len(pages) > 20
    names = set(re.findall(r'id="([^"]+)"', (tmp_path / "cagsr.html").read_text(encoding="utf-8")))
    assert set(cagsr.__all__) - {"__version__"} <= names
    assert "train" in re.findall(r'id="([^"]+)"', (tmp_path / "cagsr/train.html").read_text(encoding="utf-8"))


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there">x</a><a href="b.html#gone">y</a><a href="#">z</a>')
    (tmp_path / "b.html").write_text('<p id="there"><img src="none.png"><a href="https://example.org/x#y">w</a>')
    (tmp_path / "c.html").write_text("")
    assert sorted(dead_links(tmp_path)) == ["a.html: b.html#gone", "b.html: none.png"]
    assert reached(tmp_path / "a.html") == {tmp_path / "a.html", tmp_path / "b.html"}
