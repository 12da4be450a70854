"""Preference rows: TRL's formats, and every mistake named with its file and row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cagsr.config import DataConfig, ModelConfig, RewardModelConfig
from cagsr.errors import DataError
from cagsr.preferences.pairs import count_pairs, read_preferences
from cagsr.quickstart.start_model import build_tokenizer

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{{ '[assistant]' if add_generation_prompt }}"
GOOD = {"prompt": "name: Mara.", "chosen": " Mara is a baker.", "rejected": " Mara."}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    data = write_rows(tmp_path / "prefs.jsonl", [GOOD])
    return RewardModelConfig(model=ModelConfig("none"), data=DataConfig(str(data)), output_dir=str(tmp_path / "rm"))


def test_plain_rows(config: RewardModelConfig) -> None:
    write_rows(Path(config.data.path), [GOOD, {**GOOD, "rater": "Ann"}])
    first, second = read_preferences(config, build_tokenizer())
    assert (first.prompt.text, first.chosen, first.rejected) == ("name: Mara.", " Mara is a baker.", " Mara.")
    assert first.where.endswith("prefs.jsonl, row 1")
    assert second.prompt.columns["rater"] == "Ann"


def test_conversational_rows(config: RewardModelConfig) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    row = {
        "prompt": [{"role": "user", "content": "Mara"}],
        "chosen": [{"role": "assistant", "content": "Mara is a baker."}],
        "rejected": "Mara.",  # text does as well
    }
    write_rows(Path(config.data.path), [row])
    [pair] = read_preferences(config, tokenizer)
    assert pair.prompt.text == "[user] Mara [assistant]"
    assert (pair.chosen, pair.rejected) == ("Mara is a baker.", "Mara.")


def test_columns_and_files_can_be_named(config: RewardModelConfig, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"q": "name: Mara.", "win": " Mara.", "lose": " No."}])
    named = replace(config, chosen_column="win", rejected_column="lose", data=replace(config.data, prompt_column="q"))
    [pair] = read_preferences(named, build_tokenizer(), str(other))
    assert (pair.prompt.text, pair.chosen, pair.rejected) == ("name: Mara.", " Mara.", " No.")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected' (columns besides the prompt: chosen)"),
        ({"prompt": "a", "completion": "b"}, "name the column with --chosen_column"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
        ({**GOOD, "rejected": "  "}, "the answer in column 'rejected' is empty"),
        ({**GOOD, "chosen": None}, "the answer in column 'chosen' is empty"),
        ({**GOOD, "chosen": True}, "must hold text"),
        ({**GOOD, "chosen": [{"role": "assistant", "content": "x"}]}, "must be text too"),
        (
            {**GOOD, "prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "user", "content": "x"}]},
            "one message of the assistant",
        ),
    ],
)
def test_rows_that_are_no_preferences(config: RewardModelConfig, row: dict[str, Any], part: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    write_rows(Path(config.data.path), [GOOD, row])
    with pytest.raises(DataError) as caught:
        read_preferences(config, tokenizer)
    assert "prefs.jsonl, row 2: " in str(caught.value)
    assert part in str(caught.value)


def test_pairs_of_equal_answers_are_left_out_and_counted(config: RewardModelConfig) -> None:
    equal = {**GOOD, "rejected": "Mara is  a baker. "}
    write_rows(Path(config.data.path), [equal, GOOD, equal])
    notes: list[str] = []
    [pair] = read_preferences(config, build_tokenizer(), notes=notes)
    assert pair.where.endswith("row 2")
    assert notes == [f"2 pairs have two equal answers and were left out of {config.data.path}."]
    assert count_pairs(config.data.path) == 1
    write_rows(Path(config.data.path), [equal, equal])
    with pytest.raises(DataError, match="are the same in all 2 pairs"):
        read_preferences(config, build_tokenizer())


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, "only calls tools"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "is not text"),
    ],
)
def test_an_answer_without_text_is_named(config: RewardModelConfig, message: dict[str, Any], part: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    write_rows(Path(config.data.path), [{**GOOD, "prompt": [{"role": "user", "content": "x"}], "chosen": [message]}])
    with pytest.raises(DataError, match=rf"row 1: .*'chosen'.*{part}|row 1: .*{part}.*'chosen'"):
        read_preferences(config, tokenizer)
