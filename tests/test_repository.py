"""What is in git: how much in all, figures written small, and no page that a command makes from a file beside it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tools import html
from tools.compact_svg import compact
from tools.compact_svg import main as compact_files

from links import dead_links

ROOT = Path(__file__).parent.parent
MOST_BYTES = 5_250_000
"""Of all tracked files together, of which the package and its tests are 3,800,000: what grows it should be code, not copies."""


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_tracked_files_are_small() -> None:
    assert sum(path.stat().st_size for path in _tracked()) <= MOST_BYTES


def test_no_page_is_tracked_that_a_command_makes() -> None:
    assert [path for path in _tracked() if path.suffix == ".html"] == []


def test_every_figure_is_shown_and_small() -> None:
    documents = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for path in _tracked():
        if path.suffix in (".svg", ".png"):
            assert f"({path.parent.name}/{path.name})" in documents, f"no document shows {path}"
            assert path.stat().st_size <= 20_000, f"{path}: make figures"


def _figure(path: Path) -> str:
    figure = Figure(figsize=(4, 2))
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0.0, 2.0, 1.0], marker="o", color="#0072B2", label="a & b")
    axes.errorbar([0.5, 1.5], [1, 1], xerr=[0.2, 0.2], fmt="s", color="#D55E00", capsize=2)
    axes.fill_between([0, 2], [0, 1], [1, 2], color="#009E73", alpha=0.15)
    axes.set_yscale("symlog")
    axes.set_ylabel("of y")
    axes.legend()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path.read_text(encoding="utf-8")


def test_a_compact_figure_shows_the_same(tmp_path: Path) -> None:
    text = _figure(tmp_path / "figure.svg")
    assert compact_files([str(tmp_path)]) == 0
    small = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert small == compact(text) == compact(small)
    assert len(small) < len(text) / 4
    assert _words(small) == _words(text)
    assert "rotate(-90" in small
    assert 'fill-opacity="0.15"' in small
    # The curve's three points, to a tenth of a point, and a marker at each of them.
    curve = re.search(
        r'<path d="M (\S+) (\S+) \nL (\S+) (\S+) \nL (\S+) (\S+) \n" clip-path="[^"]*" style="[^"]*#0072b2', text
    )
    assert curve is not None
    points = np.array(curve.groups(), dtype=float).reshape(3, 2)
    drawn = re.findall(r'stroke="#0072b2" stroke-width="1.5" d="M([^M"]+)', small)[0]
    np.testing.assert_allclose(_points(drawn), points, atol=0.06)
    marked = re.findall(r'marker-start="url[^>]* d="M([^M"]+)"', small)[0]
    np.testing.assert_allclose(_points(marked)[:3], points, atol=0.06)
    assert small.count('fill="#0072b2"') == 2  # the curve's marker, and the legend's


def _words(svg: str) -> list[str]:
    found = ElementTree.fromstring(svg).iter()
    return sorted(
        one.text.strip() for one in found if one.tag.endswith(("}text", "}tspan")) and (one.text or "").strip()
    )


def _points(path: str) -> NDArray[np.float64]:
    """Where a compact path goes: its first point, then relative moves."""
    return np.array(re.findall(r"-?[\d.]+", path), dtype=float).reshape(-1, 2).cumsum(axis=0)


def test_a_document_becomes_a_page_that_needs_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    _figure(tmp_path / "docs" / "picture.svg")
    (tmp_path / "docs" / "one.md").write_text(
        "# One\n\n## A `b` c, d\n\n![of y](picture.svg)\n\n| a | b |\n| --- | --- |\n| 1 | <b> |\n\n"
        "[two](two.md#name) [x](https://a.org/x.md) [p](picture.svg)\n"
    )
    (tmp_path / "docs" / "two.md").write_text("# Name\n\n[one](one.md#a-b-c-d)\n")
    monkeypatch.chdir(tmp_path)
    assert html.main(["out", "docs"]) == 0
    out = tmp_path / "out" / "docs"
    page = (out / "one.html").read_text(encoding="utf-8")
    assert 'src="data:image/svg+xml;base64,' in page
    assert '<a href="two.html#name">' in page
    assert '<a href="https://a.org/x.md">' in page
    assert "<td>&lt;b&gt;</td>" in page
    assert dead_links(out) == []


def test_the_documents_become_pages_without_a_dead_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = re.search(r"-m tools\.html build/html (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert recipe is not None
    assert html.main([str(tmp_path), *recipe[1].split()]) == 0
    assert len(list(tmp_path.rglob("*.html"))) > 20
    assert dead_links(tmp_path) == []
