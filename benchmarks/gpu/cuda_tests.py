"""The tests that need a GPU (marked ``cuda``), by pytest."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from pathlib import Path

from benchmarks.bare_checkout import ROOT
from benchmarks.gpu.setting import Keep, Setting

MARK = "mark.cuda"


def files() -> list[str]:
    """The files that have such tests: to look into all would import what may be missing."""
    return sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if MARK in path.read_text(encoding="utf-8"))


def measure(setting: Setting, keep: Keep) -> None:
    """Run them; what failed is named."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "tests.xml"
        options = ["-m", "cuda", "-o", "addopts=-q", "-p", "no:cacheprovider", "--noconftest", f"--junitxml={written}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files()], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if not written.exists():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise RuntimeError(f"pytest did not run ({re.sub('=+', '', ' '.join(last)).strip()})")
        cases = list(tree.parse(written).iter("testcase"))
    failed = [
        str(case.get("name")) for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": len(failed)}
    keep(", ".join(Path(name).name for name in files()), figures | ({"failures": "; ".join(failed)} if failed else {}))
