"""LLMBar's example: shares worked out by hand, and a whole run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from examples import llmbar

import tiny
from cagsr.errors import DataError


def test_shares_by_hand():
    values = np.array([[2.0, 1.0], [1.0, 2.0], [3.0, 3.0], [5.0, 1.0], [np.nan, 1.0]])
    subsets = np.array(["natural", "natural", "natural", "neighbour", "manual"])
    length = np.array([[9.0, 5.0], [9.0, 5.0], [9.0, 5.0], [1.0, 5.0], [1.0, 5.0]])
    found = llmbar.shares(values, subsets, length)
    assert {name: one.mean for name, one in found.items()} == {
        "natural": 0.5,  # right, wrong, tie
        "neighbour": 1.0,
        "manual": 0.5,  # does not apply
        "adversarial": 0.75,
        "balanced": pytest.approx((1.5 / 3 + 1.5 / 2) / 2),
    }
    # Of length alone nothing is left once longer and shorter better answers count as many.
    assert llmbar.shares(length, subsets, length)["balanced"].mean == 0.5
    # Of the natural pairs three whose better answer is longer (right, wrong, tie) count as much as one that is shorter (right).
    values = np.vstack([values, [[2.0, 1.0]]])
    length = np.vstack([length, [[5.0, 9.0]]])
    found = llmbar.shares(values, np.append(subsets, "natural"), length)
    assert found["natural balanced"].mean == pytest.approx((0.5 + 1) / 2)
    assert "adversarial balanced" not in found  # there all better answers are the shorter ones


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.save_model(tmp_path / "model")
    for number, names in enumerate(llmbar.SETS.values()):
        row = {"input": "tell me about the red cat", "output_1": "the red cat", "output_2": "the dog sees a bird ."}
        rows = [{**row, "label": 1 + number % 2}]
        (tmp_path / f"LLMBar_{names[0]}.json").write_text(json.dumps(rows))
    options = llmbar.Options(tmp_path / "model", tmp_path, output=tmp_path / "o.json", markdown=tmp_path / "o.md")
    llmbar.main(options)
    assert (tmp_path / "o.md").read_text().strip() in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())["shares"]
    # The same two answers, which of them is better alternates: what prefers one set's better answer rejects the next one's.
    assert [found["length"][name]["mean"] for name in llmbar.SETS] == [0.0, 1.0, 0.0, 1.0, 0.0]
    for row in found.values():
        assert row["natural"]["mean"] == row["GPTInst"]["mean"] == pytest.approx(1 - row["neighbour"]["mean"])
    assert any(name.startswith("the sum (grounded_coverage 1") for name in found)
    assert "- repetition" in found
    (tmp_path / "LLMBar_Natural.json").write_text("[{}]")
    with pytest.raises(DataError, match=r"LLMBar_Natural\.json: not a file of LLMBar"):
        llmbar.read_pairs(tmp_path)
