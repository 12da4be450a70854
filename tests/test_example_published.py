"""The published outputs: read and judged by our checker and by the published script, here a stand-in for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from examples.e2e import published
from examples.e2e.prepare import write_jsonl

from cagsr.errors import DataError

SCRIPT = """
import pandas as pd
from tgen.data import DA

def reclassify_mr(ref, gold_mr=DA()):
    return ref, {item.slot: item.value for item in gold_mr.dais}

def check_output(gold_mr, out_mr):
    # added, missing, valerr, repeated, diff, out_mr
    return 0, sum(value not in out_mr for value in gold_mr.values()), int("eat_type" in gold_mr), 7, "", {}
"""
MEANINGS = ["name[Cotto], eatType[pub]", "name[Aromi], area[riverside]"]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    (folder / "cleaned-data").mkdir(parents=True)
    # A meaning stands once for each of its sentences; outputs are those of the different ones, in their order.
    rows = "".join(f'"{meaning}",text\n' for meaning in (MEANINGS[1], MEANINGS[1], MEANINGS[0]))
    (folder / "cleaned-data" / "test-fixed.csv").write_text("mr,ref\n" + rows)
    (folder / "slot_error.py").write_text(SCRIPT)
    for trained in published.TRAINED:
        (folder / "system-outputs" / trained).mkdir(parents=True)
        for system in published.SYSTEMS:
            for run in range(5):
                file = folder / "system-outputs" / trained / f"{system}.run{run}.txt"
                file.write_text("Aromi.\nCotto is a pub in the city centre.\n")
    (folder / "system-outputs" / "sclstm_MRs-for-eval.txt").write_text("\n".join(reversed(MEANINGS)))
    return folder


def test_both_judges_by_hand(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_jsonl(tmp_path / "train.jsonl", [])
    test = [{"prompt": meaning.replace(", ", ","), "references": ["Cotto is a pub."]} for meaning in MEANINGS]
    write_jsonl(tmp_path / "test.jsonl", test)
    results = tmp_path / "results"
    results.mkdir()
    told = {"method": "cagsr", "prompts": [f"{MEANINGS[0]}\nDescription:"], "texts": {"greedy": ["A pub."], "x": []}}
    (results / "cagsr-seed0.json").write_text(json.dumps(told))
    pandas = sys.modules.get("pandas")
    published.main(published.Options(outputs, tmp_path, (results,)))
    assert sys.modules.get("pandas") is pandas
    assert "tgen" not in sys.modules
    lines = capsys.readouterr().out.splitlines()
    # 4 slots in all: the area is missed and one is added; the script misses riverside, and the pub is wrong.
    row = "| 50.00 (25.00 + 25.00 + 0.00) | 50.00 (25.00 + 0.00 + 25.00) |"
    assert lines[2].startswith(f"| SC-LSTM, clean data {row}")
    assert lines[2].endswith("| 10 |")
    assert lines[-1].startswith(f"| {results}: cagsr, greedy | 50.00 (50.00 + 0.00 + 0.00) |")
    assert len(lines) == 2 + 8 + 1 + 1  # heading, published, people's, the comparison's


def test_what_is_no_clone_is_refused(outputs: Path, tmp_path: Path):
    (outputs / "system-outputs" / "train-clean_test-clean" / "tgen-std.run3.txt").write_text("one\n")
    with pytest.raises(DataError, match="1 lines for 2 meaning representations"):
        published.outputs_of(outputs, "train-clean_test-clean", "tgen-std")
    with pytest.raises(DataError, match=r"slot_error\.py can't be read; give --outputs a clone"):
        published.published(tmp_path)
