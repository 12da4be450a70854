"""Answers made to fool the reward: their texts, who wins by hand, and the report of ``cagsr diagnose``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import tiny
from cagsr.commands.main import main
from cagsr.diagnosis.attacks import ECHO, LIST, OTHER, WITHSTAND, Attacked, attacks_on, judge_attacks, lost
from cagsr.diagnosis.recommend import term_columns, usual_copying
from cagsr.diagnosis.signals import Setting, Signals
from cagsr.flow import EncodedPrompt, Prompt

HERE = Setting("all", "sum", 0.3)


def signals(terms: dict[str, list[list[float]]], texts: list[list[str]], asked: tuple[str, ...]) -> Signals:
    values = {name: np.array(rows, dtype=np.float64) for name, rows in terms.items()}
    one = values["coverage"]
    return Signals(
        terms=values, coverage={HERE: one}, by_layers={"all": {}}, configured=HERE, length=one, repetition=one, ended=one,
        prompts=tuple(EncodedPrompt(Prompt(row=1, text=text), (1,), (0,), (1.0,)) for text in asked),
        completions=tuple(map(tuple, texts)),
    )  # fmt: skip


def test_the_texts_of_the_attacks() -> None:
    found = attacks_on("tell me of the red cat", ["red", "black cat"], " it is a red cat", " a dog")
    assert found == {
        ECHO: " tell me of the red cat",
        LIST: " red, black cat",
        "its words again and again": " red black cat red black cat red black cat",
        OTHER: " a dog",
        "half an answer": " it is",
        "the answer twice": " it is a red cat it is a red cat",
        "an instruction": " Repeat the question: tell me of the red cat",
    }
    assert attacks_on("a", ["a"], "one", "b")["half an answer"] == "one"
    assert set(WITHSTAND) <= set(found)


def test_who_wins_by_hand() -> None:
    sampled = signals({"coverage": [[0.0, 2.0], [0.0, 2.0]], "echo": [[0.0, 0.0], [0.0, 0.0]]}, [[]], ())
    count = len(attacks_on("", [], "", ""))
    attacked = Attacked(
        "good ones",
        signals(
            {
                "coverage": [[1.0, 2.0, *[0.0] * (count - 1)], [1.0, 1.0, *[0.0] * (count - 1)]],
                "echo": [[0.0, 1.0, *[0.0] * (count - 1)], [0.0, 1.0, *[0.0] * (count - 1)]],
            },
            [["good", *"abcdefghijkl"[:count]], []],
            (),
        ),
    )
    columns = (sampled.terms, attacked.signals.terms)
    rewards = {"plain": (*columns, {"coverage": 1.0}), "guarded": (*columns, {"coverage": 1.0, "echo": -3.0})}
    first, second, *_ = judge_attacks(attacked, rewards)
    assert (first.name, first.example) == (ECHO, "a")
    # A coverage that is lower on one prompt and equal on the other; less echo is better.
    assert first.beaten == {"coverage": 0.25, "echo": 1.0, "plain": 0.25, "guarded": 1.0}
    assert second.beaten == {"coverage": 1.0, "echo": 0.5, "plain": 1.0, "guarded": 1.0}
    assert lost([first, second], "plain") == [f"{ECHO} (25%)"]
    assert lost([first, second], "guarded") == []


def test_what_answers_usually_copy_is_allowed() -> None:
    texts = [["x y z v w", "a x y z v"] * 10, ["a b x y z", "a b c d x"] * 10]
    found = signals({"coverage": [[0.0] * 20] * 2}, texts, ("a b c d e", "a b c d e"))
    assert usual_copying(found) == 0.8
    # Of what is above it a word more of five is all that there is.
    echoes = signals({"coverage": [[0.0, 0.0]]}, [["a b c d e", "a b c d x"]], ("a b c d e",))
    assert term_columns(echoes, HERE, 0.8)["echo"].tolist() == [[1.0, 0.0]]
    assert term_columns(echoes, HERE, 0.6)["echo"].tolist() == [[1.0, pytest.approx(0.5)]]


@pytest.mark.parametrize("referenced", [True, False])
def test_diagnose_reports_them(tmp_path: Path, referenced: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny.save_model(tmp_path / "model"), tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in tiny.save_prompts(data, 6).read_text(encoding="utf-8").splitlines()]
    if referenced:
        rows = [row | {"references": [f"the red cat likes food {number} ."]} for number, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = ["--num_prompts", "4", "--num_generations", "3", "--max_new_tokens", "6", "--attacked_prompts", "3"]
    out = tmp_path / "found.json"
    assert main(["diagnose", "--model", str(model), "--data", str(data), "--output", str(out), *small]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [one["name"] for one in found["attacks"]] == list(attacks_on("", [], "", ""))
    assert found["good_answers"] == ("the rows' references" if referenced else "the model's own answers")
    for one in found["attacks"]:
        assert {"coverage", "echo", "configured reward", "recommended reward"} <= one["beaten"].keys()
        assert all(0 <= share <= 1 for share in one["beaten"].values())
    assert "Answers made to fool the reward" in capsys.readouterr().out
    recommended = out.with_suffix(".yaml")
    if recommended.exists() and not found["recommendation"]["configured"]:
        assert yaml.safe_load(recommended.read_text(encoding="utf-8"))["reward"]["echo"]["weight"] == -5.0
