"""``make`` on a fresh machine says what it installs, and goes on saying so."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
PYTHON = """#!/bin/sh
# makes an environment whose python is this script too, and takes its time to install
case "$*" in
  "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
  "-m pip install"*) echo "$*" >> asked; sleep 2.5; exit $(cat status);;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("status", [0, 3])
def test_installing_is_never_silent(status: int, tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "status").write_text(str(status))
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={python}", "BEAT=1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    said = done.stdout.splitlines()
    torch = said.index("Installing PyTorch into .venv: a large download that takes minutes.")
    assert said[torch + 1 : torch + 3] == ["... still installing (1 s)", "... still installing (2 s)"]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--constraint constraints.txt torch" in asked[0]
    assert (done.returncode == 0) == (status == 0) == (tmp_path / ".venv" / ".installed").exists()
    assert all("--editable .[all,dev]" in line for line in asked[1:])
    assert len(asked) == (2 if status == 0 else 1)
