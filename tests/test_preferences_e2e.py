"""The E2E example's preference pairs: people's judgements in our format, and no evaluation prompt in any training file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from examples.e2e import preferences, prepare
from examples.e2e.preferences import (
    EVALUATION,
    JUDGE,
    TRAINED_ON,
    Options,
    fact_sets,
    human_rows,
    prepare_preferences,
    simple_rules,
)
from examples.e2e.prepare import read_jsonl, write_jsonl

from cagsr.errors import DataError

SHARED = prepare.SHARED
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/e2e")

Rows = list[dict[str, Any]]


def judgement(name: str, area: str = "riverside") -> dict[str, Any]:
    return {
        "prompt": f"name[{name}], area[{area}]",
        "chosen": f"{name} is  by the {area} .",
        "rejected": f"{name}.",
        "agreement": 1.0,
        "raters": 2,
    }


@pytest.fixture
def small(tmp_path: Path) -> Options:
    """A work folder in which people judged two of three test prompts, and three others."""
    work, data = tmp_path / "work", tmp_path / "data"
    names = ["Alimentum", "Cotto", "Strada", "Wildwood", "Zizzi"]
    write_jsonl(data / "human_preferences.jsonl", [judgement(name) for name in names for _ in range(2)])
    # The order of the facts is another one than in the judgements: the prompt is the same all the same.
    tested = [f"area: riverside | name: {name} =>" for name in ("Cotto", "Strada", "Giraffe")]
    write_jsonl(work / "test.jsonl", [{"prompt": prompt, "references": ["x"]} for prompt in tested])
    write_jsonl(work / "held_out.jsonl", [{"prompt": "name: Wildwood | area: riverside =>"}])
    write_jsonl(
        work / "sft.jsonl",
        [
            {"prompt": f"name: {name} | area: city centre =>", "completion": f" You find {name} in the city centre."}
            for name in names
        ],
    )
    return Options(work=work, data=data, held_out=0.5, synthetic=5)


def test_what_simple_rules_would_have_chosen() -> None:
    prompt = "name: Cotto | area: riverside =>"
    full, short = "Cotto is by the riverside.", "Cotto is a nice and lovely place."
    pairs = [
        {"prompt": prompt, "chosen": full, "rejected": short},  # 5 words against 7, 0 missed against 1
        {"prompt": prompt, "chosen": full, "rejected": full},  # a tie in both
        {"prompt": prompt, "chosen": short, "rejected": "Cotto."},  # longer, as much missed
    ]
    assert simple_rules(pairs) == {
        "the longer answer": pytest.approx((0 + 0.5 + 1) / 3),
        "the answer with fewer missed facts": pytest.approx((1 + 0.5 + 0.5) / 3),
    }


def test_judgements_are_written_as_the_models_read_and_write(small: Options) -> None:
    [row] = human_rows([judgement("Cotto")])
    assert row == {
        "prompt": "name: Cotto | area: riverside =>",
        "chosen": " Cotto is by the riverside .",
        "rejected": " Cotto.",
        "agreement": 1.0,
        "raters": 2,
    }


def test_judgements_on_test_and_held_out_prompts_are_dropped(small: Options) -> None:
    counts = prepare_preferences(small)
    written = [row for part in ("train", "held_out") for row in read_jsonl(small.work / f"human.{part}.jsonl")]
    assert {row["prompt"] for row in written} == {
        f"name: {name} | area: riverside =>" for name in ("Alimentum", "Zizzi")
    }
    assert len(written) == 4
    assert counts["judgements left out"] == 6
    assert not (small.work / EVALUATION).exists()


def test_or_the_judged_prompts_are_taken_out_of_the_test_set(small: Options) -> None:
    counts = prepare_preferences(replace(small, keep="human"))
    assert counts["human.train.jsonl"] + counts["human.held_out.jsonl"] == 8
    assert counts["judgements left out"] == 2  # the held-out prompt is never trained on
    assert [row["prompt"] for row in read_jsonl(small.work / EVALUATION)] == ["area: riverside | name: Giraffe =>"]


def test_the_judge_gets_prompts_of_its_own(small: Options) -> None:
    prepare_preferences(replace(small, keep="human", judge=0.25))
    parts = [fact_sets(read_jsonl(small.work / f"human.{part}.jsonl")) for part in ("train", "held_out", "judge")]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts)) == 4
    prepare_preferences(small)
    assert not (small.work / JUDGE).exists()  # it belonged to another split
    assert not (small.work / EVALUATION).exists()


def test_a_leak_stops_it_before_anything_is_written(small: Options) -> None:
    write_jsonl(
        small.work / "sft.jsonl",
        [
            {"prompt": f"name: {name} | area: riverside =>", "completion": f" You find {name} by the riverside."}
            for name in ("Cotto", "Giraffe")
        ],
    )
    with pytest.raises(DataError, match="shares prompts"):
        prepare_preferences(small)
    assert not list(small.work.glob("human.*"))


def test_no_judgement_left(small: Options) -> None:
    write_jsonl(small.data / "human_preferences.jsonl", [judgement("Cotto")])
    with pytest.raises(DataError, match="all 1 judgements"):
        prepare_preferences(small)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's data files, made from the whole of the shared data as the example makes them."""
    work = tmp_path_factory.mktemp("e2e")
    train, test = prepare.load_rows(SHARED)
    prepare.prepare_data(prepare.Options(work=work), train, test)
    return work


@needs_data
@pytest.mark.parametrize("keep", ["test", "human"])
def test_no_evaluation_prompt_is_in_any_training_file_of_any_method(prepared: Path, keep: Any) -> None:
    judge = 0.25 if keep == "human" else 0.0
    counts = preferences.prepare_preferences(Options(work=prepared, keep=keep, judge=judge, synthetic=300))
    evaluation = fact_sets(read_jsonl(prepared / (EVALUATION if keep == "human" else "test.jsonl")))
    held_out = fact_sets(read_jsonl(prepared / "held_out.jsonl"))
    assert len(evaluation) >= 700
    for name in (*TRAINED_ON, *([JUDGE] if judge else [])):
        prompts = fact_sets(read_jsonl(prepared / name))
        assert prompts
        assert not prompts & evaluation, name
        assert not prompts & held_out, name
    train, kept_out = (fact_sets(read_jsonl(prepared / f"human.{part}.jsonl")) for part in ("train", "held_out"))
    assert not train & kept_out
    if judge:
        assert not fact_sets(read_jsonl(prepared / JUDGE)) & (train | kept_out)
    assert counts["synthetic.jsonl"] == 300
    if keep == "human":
        assert counts["judgements left out"] == 0
        assert counts["human.train.jsonl"] >= 800
        assert evaluation < fact_sets(read_jsonl(prepared / "test.jsonl"))


@needs_data
def test_machine_made_pairs_know_only_the_supervised_ones(prepared: Path) -> None:
    prepare_preferences(Options(work=prepared, synthetic=300))
    supervised = {(row["prompt"], row["completion"]) for row in read_jsonl(prepared / "sft.jsonl")}
    rows = [json.loads(line) for line in (prepared / "synthetic.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all((row["prompt"], row["chosen"]) in supervised for row in rows)
    assert {row["corruption"] for row in rows} == {"drop", "swap", "invent", "repeat", "truncate", "other"}
