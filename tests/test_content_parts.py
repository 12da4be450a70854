"""Answers whose content comes in parts, as chat APIs write it: read as the text they hold, wherever an answer is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cagsr.config import DataConfig, DpoConfig, ModelConfig, RewardModelConfig, SftConfig
from cagsr.errors import DataError
from cagsr.evaluation.given_answers import read_answers
from cagsr.flow import Prompt
from cagsr.pairs import encode_answer, encode_pairs
from cagsr.preferences.corrupt import SupervisedPair, _in_form_of
from cagsr.preferences.pairs import read_preferences
from cagsr.prompts.encode import TextEncoder
from cagsr.prompts.references import texts_of
from cagsr.prompts.render import text_of
from real_pipelines import gpt2

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = [{"type": "text", "text": "The cat "}, {"type": "text", "text": "said 42"}]
IMAGE = [{"type": "text", "text": "The cat"}, {"type": "image", "image": "cat.png"}]
ASKED = [{"role": "user", "content": "hi"}]


def message(content: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


def rows(path: Path, *given: Mapping[str, Any]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return DataConfig(str(path))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = gpt2()
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (ASKED, message(PARTS), "The cat said 42<|im_end|>"),
        (ASKED, PARTS, "The cat said 42<|im_end|>"),
        ("Description:", PARTS, "The cat said 42</s>"),
        (
            ASKED,
            [*message(PARTS), {"role": "user", "content": PARTS}, *message(PARTS)],
            "The cat said 42<|im_end|>\n<|im_start|>user\nThe cat said 42<|im_end|>\n"
            "<|im_start|>assistant\nThe cat said 42<|im_end|>",
        ),
    ],
    ids=["message", "parts alone", "plain prompt", "several turns"],
)
def test_sft_learns_the_text(tokenizer: Any, tmp_path: Path, prompt: Any, answer: Any, expected: str) -> None:
    data = rows(tmp_path / "x.jsonl", {"prompt": prompt, "completion": answer})
    (pair,), _ = encode_pairs(SftConfig(ModelConfig("x"), data, "out"), tokenizer, None)
    assert tokenizer.decode(pair.answer) == expected


def test_dpo_and_reward_models_learn_it_too(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": ASKED, "chosen": message(PARTS), "rejected": PARTS[:1]}
    data = rows(tmp_path / "x.jsonl", row)
    for config in (DpoConfig(ModelConfig("x"), data, "out"), RewardModelConfig(ModelConfig("x"), data, "out")):
        (pair,) = read_preferences(config, tokenizer)
        assert (pair.chosen, pair.rejected) == ("The cat said 42", "The cat ")
    for column, text in (("chosen", "The cat said 42<|im_end|>"), ("rejected", "The cat <|im_end|>")):
        assert tokenizer.decode(encode_answer(pair.prompt, column, TextEncoder(tokenizer), "here")) == text


def test_an_image_is_one_sentence_with_its_row(tokenizer: Any, tmp_path: Path) -> None:
    for answer in (message(IMAGE), IMAGE):
        data = rows(tmp_path / "x.jsonl", {"prompt": ASKED, "completion": answer, "chosen": answer, "rejected": "no"})
        with pytest.raises(DataError, match=r"x\.jsonl, row 1.*column 'completion'.*images are not supported"):
            encode_pairs(SftConfig(ModelConfig("x"), data, "out"), tokenizer, None)
        with pytest.raises(DataError, match=r"x\.jsonl, row 1.*column 'chosen'.*images are not supported"):
            read_preferences(DpoConfig(ModelConfig("x"), data, "out"), tokenizer)


def test_parts_without_text_are_an_empty_answer(tokenizer: Any, tmp_path: Path) -> None:
    empty: Sequence[Any] = [{"type": "text", "text": " "}]
    for answer in (empty, message(empty)):
        data = rows(tmp_path / "x.jsonl", {"prompt": ASKED, "completion": answer, "chosen": answer, "rejected": "no"})
        with pytest.raises(DataError, match=r"row 1: the completion \(column 'completion'\) is empty"):
            encode_pairs(SftConfig(ModelConfig("x"), data, "out"), tokenizer, None)
        with pytest.raises(DataError, match=r"row 1: the answer in column 'chosen' is empty"):
            read_preferences(DpoConfig(ModelConfig("x"), data, "out"), tokenizer)


def test_everything_else_that_reads_answers(tmp_path: Path) -> None:
    for answer in (PARTS, message(PARTS)):
        assert text_of(answer) == "The cat said 42"
        assert texts_of(answer) == ["The cat said 42"]
        rows(tmp_path / "x.jsonl", {"prompt": "hi", "completion": answer})
        assert read_answers(str(tmp_path / "x.jsonl")).answers == (("The cat said 42",),)
        assert SupervisedPair(ASKED, answer).answer == "The cat said 42"
    assert texts_of([PARTS, "no"]) == ["The cat said 42", "no"]
    assert _in_form_of(PARTS, "no") == [{"type": "text", "text": "no"}]
    assert Prompt(1, "hi").messages is None
