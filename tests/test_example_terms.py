"""Terms against the truth: partial correlations by hand, and the table of what ``cagsr rank`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from examples.e2e import terms

from cagsr.errors import DataError

PROMPT = "name: Aromi | food: French | area: riverside =>"
ANSWERS = {
    " Aromi serves French food by the riverside.": 1.0,
    " Aromi serves French food.": 2 / 3,
    " Aromi serves Italian food in the city centre.": 1 / 3,
}


def ranked(path: Path, **values: list[float]) -> Path:
    """Two prompts with the same three answers, each with its terms, in another order."""
    own = [
        {"completion": text, "tokens": len(text), "terms": {name: value[number] for name, value in values.items()}}
        for number, text in enumerate(ANSWERS)
    ]
    rows = [{"row": 1, "prompt": PROMPT, "candidates": own}, {"row": 2, "prompt": PROMPT, "candidates": own[::-1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_length_held_fixed() -> None:
    generator = np.random.default_rng(0)
    z = generator.normal(size=(40, 8))
    x, y = z + generator.normal(size=z.shape), z + generator.normal(size=z.shape)
    xy, xz, yz = (
        np.corrcoef(*((one - one.mean(axis=1, keepdims=True)).ravel() for one in pair))[0, 1]
        for pair in ((x, y), (x, z), (y, z))
    )
    none = np.zeros_like(z)
    found = terms.length_fixed(x, terms.Ranked((), {}, said=y, added=none, wrong=none, length=z))
    assert found.mean == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))
    assert found.low < found.mean < found.high
    nothing = terms.length_fixed(x, terms.Ranked((), {}, said=y, added=none, wrong=none, length=x))
    assert (nothing.low, nothing.mean, nothing.high) == (0.0, 0.0, 0.0)  # nothing of x is left


def test_where_a_term_does_not_apply_it_pays_nothing() -> None:
    nan = float("nan")
    found = terms.without_gaps(np.array([[1.0, nan, 3.0], [nan, nan, nan]]))
    assert found.tolist() == [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]


def test_a_term_that_counts_facts_and_one_that_counts_against_them(tmp_path: Path) -> None:
    file = ranked(tmp_path / "first.jsonl", right=[3.0, 2.0, 1.0], flat=[1.0, 1.0, 1.0])
    other = ranked(tmp_path / "kind.jsonl", right=[3.0, 2.0, 1.0], flat=[0.0, 1.0, 2.0])
    signals, truth = terms.signals_of([file, other])
    assert set(signals) == {"right", "flat (kind)", "length"}
    assert sorted(truth.said[0]) == sorted(truth.said[1]) == pytest.approx(sorted(ANSWERS.values()))
    assert truth.wrong.sum() == pytest.approx(2 * 2 / 3)  # Italian and the city centre
    assert terms.row_of(signals["right"], truth)["facts said"].mean == pytest.approx(1.0)
    row = terms.row_of(signals["flat (kind)"], truth)
    assert row["facts said"].mean == pytest.approx(-1.0)
    assert row["of the oracle's gain"].mean == pytest.approx(-1.0)
    table = terms.table_of("tiny", [file, other]).splitlines()
    assert table[0].startswith("**tiny**: 2 prompts, 3 answers each; facts said 0.667, best of 3 by an oracle 1.000;")
    assert table[4].startswith("| right | +1.00 [+1.00, +1.00] |")


def test_other_answers_and_other_files_are_refused(tmp_path: Path) -> None:
    file = ranked(tmp_path / "first.jsonl", right=[3.0, 2.0, 1.0])
    changed = tmp_path / "changed.jsonl"
    changed.write_text(file.read_text().replace("serves", "has"))
    with pytest.raises(DataError, match=r"changed\.jsonl: other answers than .*first\.jsonl"):
        terms.signals_of([file, changed])
    changed.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"changed\.jsonl: not what cagsr rank writes"):
        terms.read_ranked(changed)
