"""The generated tasks: rows are what they say, annotators slip as often as they should, measures are right by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examples.generated import measures
from examples.generated.tasks import ASK, rows
from examples.generated.write import Options, character_tokenizer, main, word_tokenizer

from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import read_plan
from cagsr.config import validate
from cagsr.sandbox.run import protection, unprotected
from cagsr.tasks.arithmetic import equations
from cagsr.tasks.final_answer import final_answer

ROOT = Path(__file__).parents[1]


def test_sets_never_meet():
    for task in ("steps", "code", "conversation"):
        sets = {part: {json.dumps(row.get("prompt") or row["messages"][:7:2]) for row in rows(task, part, 60, 0)} for part in
                ("pairs", "prompts", "test")}  # fmt: skip
        assert [len(own) for own in sets.values()] == [60, 60, 60], task
        assert not sets["pairs"] & sets["prompts"]
        assert not sets["prompts"] & sets["test"]
        assert rows(task, "test", 5, 1) == rows(task, "test", 5, 1)


def test_the_annotator_of_sums_slips_now_and_then():
    pairs, test = rows("steps", "pairs", 400, 0), rows("steps", "test", 50, 0)
    held = [all(equations(row["completion"])) for row in pairs]
    whole = [measures.used(row["prompt"], row["completion"]) == 1.0 for row in pairs]
    assert 0.85 < sum(held) / len(held) < 0.97
    assert 0.4 < sum(whole) / len(whole) < 0.6
    for row in test:
        numbers = [int(part) for part in row["prompt"][4:-2].split(", ")]
        assert row["answer"] == str(sum(numbers))
    assert all(final_answer(row["completion"]) for row in pairs)


def test_sums_are_judged_by_hand():
    prompt = "Add 4, 17, 4.\n"
    found = measures.steps(
        [prompt] * 3, ["4+17=21\n21+4=25\n#### 25", "4+17=22\n#### 22", "#### 25"], answer=["25"] * 3
    )
    assert found[0] == {"correct": 1.0, "equations": 2.0, "valid_equations": 1.0, "used": 1.0}
    assert found[1] == {"correct": 0.0, "equations": 1.0, "valid_equations": 0.0, "used": pytest.approx(2 / 3)}
    assert found[2] == {"correct": 1.0, "equations": 0.0, "valid_equations": None, "used": 0.0}


@pytest.mark.skipif(bool(unprotected(protection())), reason="this machine can't protect itself from code")
def test_the_annotator_s_functions_pass_as_often_as_he_makes_no_slip():
    tests = rows("code", "test", 30, 0)
    assert all(row["prompt"].startswith('def f(x):\n    """') for row in tests)
    # Both sets are drawn alike: what the annotator would write for a test row is what its own docstring says, or a slip of it.
    import examples.generated.tasks as tasks

    right = [f"    return {tasks._expression(_read(row['prompt']))}" for row in tests]
    columns = {name: [row[name] for row in tests] for name in ("test", "entry_point")}
    prompts = [row["prompt"] for row in tests]
    assert [one["passed"] for one in measures.code(prompts, right, **columns)] == [1.0] * 30
    pairs = rows("code", "pairs", 300, 0)
    same = [row["completion"] == f"    return {tasks._expression(_read(row['prompt']))}" for row in pairs]
    assert 0.38 < sum(same) / len(same) < 0.6


def _read(prompt: str) -> list[tuple[str, int]]:
    import re

    from examples.generated.tasks import OPERATIONS

    words = prompt.split('"""')[1].rstrip(".")
    found = []
    for part in words.split(", then "):
        number = re.findall(r"\d+", part)[0]
        kind = (part[0].lower() + part[1:]).replace(number, "{}")
        assert kind in OPERATIONS
        found.append((kind, int(number)))
    return found


def test_talks_are_judged_by_hand():
    facts = ["job: baker", "city: Oslo", "pet: cat", "food: soup"]
    texts = ["Mara is a baker and lives in Oslo. Mara keeps a cat. Mara keeps a cat.", "Mara likes curry.", ""]
    found = measures.conversation([""] * 3, texts, [facts] * 3)
    assert found[0] == {"said": 0.75, "said_early": 1.0, "said_late": 0.5, "made_up": 0.0, "again": 1.0}
    assert found[1] == {"said": 0.0, "said_early": 0.0, "said_late": 0.0, "made_up": 1.0, "again": 0.0}
    assert measures.said([f"… {ASK}<|end|><|assistant|>", "…"], [texts[0], "what"], [facts] * 2) == [0.75, 1.0]
    asked, other = ([{"role": "user", "content": content}] for content in (ASK, "no"))
    answers = [[{"role": "assistant", "content": text}] for text in (texts[0], texts[1], texts[0])]
    assert measures.told([asked, asked, other], answers, [facts] * 3) == [0.75, -0.25, 0.0]


def test_what_was_said_long_ago_is_forgotten_most():
    found = []
    for row in rows("conversation", "pairs", 400, 0):
        turns = [row["messages"][place]["content"] for place in (0, 2, 4)]
        summary = measures.stated_facts(row["messages"][-1]["content"])
        found.append([any(value in turn for _, value in summary) for turn in turns])
    early, middle, late = (sum(one) / len(found) for one in zip(*found, strict=True))
    assert early < middle < late


@pytest.mark.parametrize("task", ["steps", "code", "conversation"])
def test_files_and_a_model_are_written(task: str, tmp_path: Path):
    main(Options(task, tmp_path, pairs=40, prompts=20, held_out=5, test=10, hidden_size=16, layers=1))  # type: ignore[arg-type]
    read = {
        name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("sft", "prompts", "held_out", "test")
    }
    assert [len(own) for own in read.values()] == [60 if task == "conversation" else 40, 20, 5, 10]
    tokenizer = word_tokenizer() if task == "conversation" else character_tokenizer()
    for line in read["sft"]:
        row = json.loads(line)
        text = (
            tokenizer.apply_chat_template(row["messages"], tokenize=False)
            if "messages" in row
            else row["prompt"] + row["completion"]
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert all("prompt" in json.loads(line) for line in read["test"])  # judged as one prompt, with its history
    assert (tmp_path / "init" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["steps", "code", "conversation"])
@pytest.mark.parametrize("fast", [False, True])
def test_plans_can_be_read(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(ROOT / "examples" / "generated" / f"{name}.yaml", fast=fast)
    for method in plan.methods:
        validate(reward_settings(plan, method, 0))
