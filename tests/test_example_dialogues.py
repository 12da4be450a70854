"""The dialogues' example: domains never meet, values and what is taken up by hand, the plan can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examples.dialogues import measures, prepare

import tiny
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import read_plan
from cagsr.config import ModelConfig, validate
from cagsr.errors import DataError
from cagsr.models.load import load_model

ROOT = Path(__file__).parents[1]


def talk(service: str, turns: int, name: str) -> dict[str, object]:
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": f"{name} says {place}."} for place in range(2 * turns)
    ]
    return {"messages": messages, "services": [f"{service}_1"]}


def test_domains_never_meet(tmp_path: Path):
    rows = [talk("Hotels", 6, f"h{n}") for n in range(8)] + [talk("Flights", 4, f"f{n}") for n in range(3)]
    rows += [
        {**talk("Hotels", 3, "mixed"), "services": ["Hotels_1", "Flights_2"]},
        {"messages": [{"role": "assistant", "content": "x"}], "services": ["Hotels_1"]},
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = prepare.Options(tmp_path / "work", None, data, pairs=3, held_out=2, test=20, turns=2)
    prepare.main(options)
    read = {
        name: [json.loads(line) for line in (options.work / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "held_out", "prompts", "test")
    }
    assert {name: len(own) for name, own in read.items()} == {"sft": 3, "held_out": 2, "prompts": 3, "test": 9}
    assert all(len(row["messages"]) == 4 for row in [*read["held_out"], *read["prompts"]])
    assert all(row["messages"][-1]["role"] == "assistant" for row in read["sft"])
    trained = {row["messages"][0]["content"] for name in ("sft", "held_out", "prompts") for row in read[name]}
    assert len(trained) == 8
    assert all(text.startswith("h") for text in trained)
    for row in read["test"]:
        assert row["domain"] == "Flights"
        assert len(row["prompt"]) in (3, 5, 7)  # with a history
        assert row["references"] == [
            row["prompt"][-1]["content"].replace(f"{len(row['prompt']) - 1}.", f"{len(row['prompt'])}.")
        ]
    with pytest.raises(DataError, match="too few for 30 pairs"):
        prepare.main(prepare.Options(tmp_path / "work", None, data, pairs=30))
    with pytest.raises(DataError, match="no such file"):
        prepare.main(prepare.Options(tmp_path / "work", None, tmp_path / "none.jsonl"))


def test_a_base_model_gets_a_chat_template(tmp_path: Path):
    model = tiny.save_model(tmp_path / "model")
    prepare.write_base(model, tmp_path / "base")
    loaded = load_model(ModelConfig(str(tmp_path / "base"), device="cpu"))
    said = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], tokenize=False, add_generation_prompt=True
    )
    assert said.endswith("<start_of_turn>user\nthe cat<end_of_turn>\n<start_of_turn>model\n")
    with pytest.raises(DataError, match="no model there"):
        prepare.write_base(tmp_path / "none", tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I'd like a table for 4 at 7:30 pm in San Jose.", {"4", "7:30", "san", "jose"}),
        ("Yes. Please book it.", set()),
        ("Is there a flight to Paris? Tomorrow.", {"paris"}),
        ("", set()),
    ],
)
def test_values(text: str, found: set[str]):
    assert measures.values(text) == found


def test_an_answer_is_judged_by_hand():
    messages = [
        {"role": "user", "content": "A flight to Paris please."},
        {"role": "assistant", "content": "When do you want to leave?"},
        {"role": "user", "content": "On the 5th, from Oslo."},
    ]
    rendered = "<bos>" + "".join(
        f"<start_of_turn>{'model' if one['role'] == 'assistant' else 'user'}\n{one['content']}<end_of_turn>\n"
        for one in messages
    )
    answer = "When do you want to fly from Oslo to Rome?"
    for prompt in (messages, rendered + "<start_of_turn>model\n"):
        (found,) = measures.report([prompt], [answer])
        assert found["taken_up"] == 0.5
        assert found["history_taken_up"] == 0.0
        assert found["said_before"] == pytest.approx(3 / 8)  # when do you, do you want, you want to
        assert found["echoed"] == 0.0
        assert found["made_up"] == 1.0
    (copied,) = measures.report([messages], ["On the 5th, from Oslo to Rome."])
    assert copied["echoed"] == pytest.approx(3 / 5)  # on the 5th, the 5th from, 5th from oslo
    (none,) = measures.report([[{"role": "user", "content": "hello"}]], ["hi"])
    assert none["taken_up"] is None


@pytest.mark.parametrize("fast", [False, True])
def test_the_plan_can_be_read(fast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(ROOT / "examples" / "dialogues" / "dialogues.yaml", fast=fast, variables=["model=gemma"])
    for method in plan.methods:
        validate(reward_settings(plan, method, 0))
