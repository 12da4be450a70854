"""``cagsr generate`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from cagsr.commands.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", 5)


def generate(model: Path, *more: str) -> int:
    return main(["generate", "--model", str(model), "--model.device", "cpu", "--max_new_tokens", "6", *more])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_come_in_order_with_their_prompt(model: Path, prompts: Path, tmp_path: Path):
    out = tmp_path / "answers.jsonl"
    assert generate(model, "--data", str(prompts), "--num_generations", "2", "--output", str(out)) == 0
    rows = lines(out)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in lines(prompts) for _ in range(2)]
    assert set(rows[0]) == {"prompt", "completion", "tokens", "ended"}
    assert all(1 <= row["tokens"] <= 6 for row in rows)
    assert all(row["ended"] or row["tokens"] == 6 for row in rows)


def test_the_seed_decides_and_batches_of_one_seed_differ(model: Path, prompts: Path, tmp_path: Path):
    texts = []
    for seed, name in (("0", "a"), ("0", "b"), ("1", "c")):
        out = tmp_path / f"{name}.jsonl"
        assert generate(model, "--data", str(prompts), "--seed", seed, "--output", str(out)) == 0
        texts.append([row["completion"] for row in lines(out)])
    assert texts[0] == texts[1] != texts[2]
    same = tmp_path / "same.jsonl"
    same.write_text(
        json.dumps({"prompt": "tell me about the red cat"}) + "\n" + json.dumps({"prompt": "tell me about the red cat"})
    )
    out = tmp_path / "same_out.jsonl"
    assert generate(model, "--data", str(same), "--batch_size", "1", "--output", str(out)) == 0
    first, second = lines(out)
    assert first["completion"] != second["completion"]


def test_standard_output_is_jsonl_alone(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(model, "--data", str(prompts)) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 5


def test_columns_and_token_ids_on_demand(model: Path, tmp_path: Path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps({"prompt": "the cat", "id": 7, "completion": "the old one"}) + "\n")
    assert generate(model, "--data", str(data), "--keep_columns", "--token_ids", "--output", str(out)) == 0
    (row,) = lines(out)
    assert row["id"] == 7
    assert row["completion"] != "the old one"
    assert len(row["completion_ids"]) == row["tokens"]


def test_one_prompt_prints_its_answer(model: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(model, "--prompt", "tell me about the cat", "--sampling.temperature", "0") == 0
    said = capsys.readouterr().out
    assert said.strip()
    assert not said.startswith("{")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Give either --data FILE or --prompt TEXT"),
        (["--prompt", "the cat", "--data", "x.jsonl"], "not both"),
        (["--prompt", "the cat", "--output", "/nowhere/at/all.jsonl"], "/nowhere/at does not exist"),
        (["--prompt", "the cat", "--num_generations", "0"], "num_generations 0: must be 1 or more"),
        (["--prompt", "the cat", "--sampling.top_p", "0"], "top_p 0: must be above 0, up to 1"),
        (["--prompt", "the cat", "--max_new_tokens", "64"], "leaves no room"),
        (["--prompt", "the cat " * 40], "--prompt, row 1: the prompt has 81 tokens"),
    ],
)
def test_bad_input_is_one_sentence(model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str):
    assert generate(model, *flags) == 2
    assert sentence in capsys.readouterr().err
