"""SciTLDR's example: its files share no abstract, what a summary makes up, and the ceiling's reward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from examples.e2e.prepare import read_jsonl, write_jsonl
from examples.scitldr import measures, prepare

from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import read_plan
from cagsr.errors import DataError
from cagsr.reward.user_functions import load_function

ROOT = Path(__file__).parent.parent
ABSTRACT = "We train generative adversarial networks on ImageNet with two losses. Accuracy rises by 4.5 % with SGD."


@pytest.mark.parametrize(
    ("summary", "numbers", "names"),
    [
        ("GANs on Imagenet with 2 losses and SGD.", set(), set()),
        ("We get 4.5 % with Adam. Accuracy of 45 % on 3 sets.", {"45", "3"}, {"Adam"}),
        ("Networks of a new kind. BERT learns, CNNs too.", set(), {"BERT", "CNNs"}),
        ("Deep learning works. It does.", set(), set()),  # capitals that begin a sentence name nothing
        ("", set(), set()),
    ],
)
def test_what_is_invented(summary: str, numbers: set[str], names: set[str]):
    assert measures.invented(prepare.as_prompt(ABSTRACT), summary) == (numbers, names)


def test_report_takes_best_and_mean_over_the_references():
    (found,) = measures.report([ABSTRACT], ["the cat sat"], [["the cat sat", "the dog ran"]])
    assert (found["rouge_1"], found["rouge_1_mean"]) == pytest.approx((1.0, (1 + 1 / 3) / 2))
    assert (found["rouge_2"], found["rouge_2_mean"], found["rouge_l_mean"]) == pytest.approx((1.0, 0.5, 2 / 3))
    assert found["invented"] == 0.0


def test_files_share_no_abstract(tmp_path: Path):
    def rows(names: str) -> list[dict[str, object]]:
        return [
            {"source": [f"We study {name}.", "It  works."], "target": [f"A {name}."], "title": ""} for name in names
        ]

    write_jsonl(tmp_path / "train.jsonl", [*rows("abcdefgh"), *rows("aX"), {"source": ["w"] * 9, "target": ["Long."]}])
    write_jsonl(tmp_path / "dev.jsonl", [{**rows("X")[0], "target": ["A.", " ", "B."]}])
    options = prepare.Options(tmp_path / "work", tmp_path, pairs=3, held_out=1, longest=8)
    prepare.main(options)
    files = {name: read_jsonl(options.work / f"{name}.jsonl") for name in ("sft", "held_out", "prompts", "test")}
    assert {name: len(some) for name, some in files.items()} == {"sft": 3, "held_out": 1, "prompts": 4, "test": 1}
    prompts = [row["prompt"] for some in files.values() for row in some]
    assert len(set(prompts)) == len(prompts) == 9
    assert files["test"] == [{"prompt": "We study X. It works.\nTL;DR:", "references": ["A.", "B."]}]
    assert all(set(row) == {"prompt"} for row in files["prompts"])
    assert all(row["completion"].startswith(" A ") for row in files["sft"])
    with pytest.raises(DataError, match="8 abstracts are left, and more than 9 are needed"):
        prepare.main(prepare.Options(tmp_path, tmp_path, pairs=8, held_out=1, longest=8))
    write_jsonl(tmp_path / "dev.jsonl", [{"source": ["A."]}])
    with pytest.raises(DataError, match=r"dev\.jsonl, row 1: not a row of SciTLDR"):
        prepare.main(options)


def test_the_ceiling_reads_its_references_below_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(ROOT / "examples/scitldr/scitldr.yaml", fast=True, variables=["model=x"])
    reward = reward_settings(plan, "reference", 0).reward
    assert reward.function_settings == ["RougeToReference.file=runs/scitldr-fast/labelled.jsonl"]
    file = tmp_path / "labelled.jsonl"
    write_jsonl(file, [{"prompt": "a", "references": ["the cat sat", "dogs"]}])
    term = load_function(reward.functions[0], settings={"file": str(file)})
    prompts = SimpleNamespace(prompts=[SimpleNamespace(text="a")] * 2)
    episodes = SimpleNamespace(prompts=prompts, completions=["the dogs sat", "dogs"], ids=torch.zeros(2, 1))
    assert term(SimpleNamespace(episodes=episodes)).tolist() == pytest.approx([2 / 3, 1.0])  # type: ignore[arg-type]
    prompts.prompts = [SimpleNamespace(text="b")] * 2
    with pytest.raises(DataError, match="has no references for the prompt 'b'"):
        term(SimpleNamespace(episodes=episodes))  # type: ignore[arg-type]
