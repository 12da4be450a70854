"""The contract of pyproject.toml on who may import whom holds, would be broken by a wrong import, and leaves no room out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
SETTINGS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
[CONTRACT] = tomllib.loads(SETTINGS)["tool"]["importlinter"]["contracts"]
ROOMS = [name for layer in CONTRACT["layers"] for name in re.split(r"\s*[|:]\s*", layer)]


def _kept(layers: list[str], folder: Path) -> bool:
    """Whether the contract holds with other layers than those of pyproject.toml."""
    written = "layers = [" + ", ".join(f'"{layer}"' for layer in layers) + "]"
    changed, count = re.subn(r"^layers = \[.*?^\]", written, SETTINGS, flags=re.M | re.S)
    assert count == 1
    (folder / "contract.toml").write_text(changed, encoding="utf-8")
    return lint_imports(str(folder / "contract.toml"), no_cache=True, no_logo=True) == 0


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        (CONTRACT["layers"], True),
        (CONTRACT["layers"][::-1], False),
        ([layer for layer in CONTRACT["layers"] if layer != "errors"], False),
    ],
    ids=["as it is", "upside down", "a module that has no place"],
)
def test_rooms_import_what_comes_before_them(layers: list[str], kept: bool, tmp_path: Path) -> None:
    assert _kept(layers, tmp_path) is kept


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for room in ROOMS:
        place = f"{room}/" if (ROOT / "src/cagsr" / room).is_dir() else f"{room}.py"
        assert f"`{place}`" in page, f"docs/architecture.md does not name {place}"
