"""Recorded runs (recorded_runs.py) come out the same, but for the rounding of machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recorded_runs

RECORDED = Path(__file__).with_name("recorded")


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.jsonl")))
def test_a_recorded_run_has_not_moved(name: str, tmp_path: Path) -> None:
    rows = recorded_runs.prompts(made_up=True)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = recorded_runs.RUNS[name][0]
    recorded_runs.save(tmp_path / kind, kind, rows)
    recorded_runs.run(tmp_path, name, steps=2)
    now = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]
    assert [row.keys() for row in now] == [row.keys() for row in before]
    for new, old in zip(now, before, strict=True):
        assert new == pytest.approx(old, rel=2e-3, abs=2e-4)
