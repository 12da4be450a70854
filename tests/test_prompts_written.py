"""Prompts that were rendered before they were written: one BOS, and the template's marks are no words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from cagsr.config import DataConfig, SalienceConfig
from cagsr.prompts.chat import is_rendered, written_marks
from cagsr.prompts.encode import TextEncoder
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.salience import explain_salience
from cagsr.prompts.stream import PromptSet
from cagsr.reward.model import encode_answered
from prompts_tokenizers import byte_bpe, word_level

TEXT = "<|im_start|>user\nthe cat sat<|im_end|>\n<|im_start|>assistant\n"


def with_bos() -> Any:
    tokenizer = byte_bpe(chat=True)
    tokenizer.bos_token = "<|pad|>"
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", number)]
    )
    return tokenizer


def prepared(tmp_path: Path, texts: list[str], tokenizer: Any) -> PromptSet:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    salience = SalienceConfig(weighting="uniform", skip_sink=False)
    return prepare_prompts(DataConfig(path=str(file)), salience, tokenizer, max_length=500)


def test_marks_are_no_words(tmp_path: Path) -> None:
    tokenizer = byte_bpe(chat=True)
    marked = [TEXT[start:end] for start, end in written_marks(TEXT, tokenizer)]
    assert marked == ["<|im_start|>user", "<|im_end|>\n<|im_start|>assistant"]
    found = prepared(tmp_path, [TEXT, "the user sat"], tokenizer)
    words = [[word for word, _ in explain_salience(one, tokenizer)] for one in found.prompts]
    assert words == [["the", "cat", "sat"], ["the", "user", "sat"]]
    assert set(found.frequency.counts) == {"the", "cat", "sat", "user"}
    assert found.frequency.counts["user"] == 1  # of the prompt that says it
    assert any(note.startswith("1 of 2 prompts hold a chat template's marks") for note in found.notes)


def test_a_template_of_plain_words_marks_nothing() -> None:
    tokenizer = byte_bpe(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    assert written_marks("user: the cat\nassistant:", tokenizer) == ()
    assert not is_rendered("user: the cat\nassistant:", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    assert [slice(*one) for one in written_marks("[INST] hi [/INST]", tokenizer)] == [slice(0, 6), slice(10, 17)]


def test_a_base_models_tokenizer_knows_roles_by_its_special_tokens() -> None:
    tokenizer = byte_bpe()  # <|im_start|> is special, <|im_end|> its EOS, and there is no template
    marked = [TEXT[start:end] for start, end in written_marks(TEXT, tokenizer)]
    assert marked == ["<|im_start|>user", "<|im_end|>", "<|im_start|>assistant"]
    assert is_rendered(TEXT, tokenizer)
    for text in ("the cat<|im_end|>", "<|im_end|>cat\nsat", "<|im_start|> the cat"):
        assert not is_rendered(text, tokenizer), text


def test_a_bos_that_is_written_is_not_put_a_second_time(tmp_path: Path) -> None:
    tokenizer = with_bos()
    bos = tokenizer.bos_token_id
    assert tokenizer(f"{tokenizer.bos_token}the cat")["input_ids"][:2] == [bos, bos]  # what the tokenizer does
    plain, written = (
        TextEncoder(tokenizer).encode(text, add_special_tokens=True) for text in ("the cat", "<|pad|>the cat")
    )
    assert plain.ids == written.ids
    assert written.ids.count(bos) == 1
    assert written.offsets[0] == (0, 7)
    found = prepared(tmp_path, ["<|pad|>the cat"], tokenizer)
    assert found.prompts[0].ids == plain.ids
    assert any("no second BOS is put" in note for note in found.notes)
    reads = encode_answered(found.prompts[0].prompt, " sat", tokenizer)
    assert reads == encode_answered(prepared(tmp_path, ["the cat"], tokenizer).prompts[0].prompt, " sat", tokenizer)


def test_an_eos_that_is_written_is_not_put_a_second_time() -> None:
    tokenizer = word_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    encoder = TextEncoder(tokenizer)
    once = encoder.encode("the cat", add_special_tokens=True).ids
    assert once[-1] == tokenizer.eos_token_id
    assert encoder.encode("the cat </s>", add_special_tokens=True).ids == once


def test_a_prefill_is_said_with_how_to_read_pairs(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}] * 2
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    salience, tokenizer = SalienceConfig(weighting="uniform"), byte_bpe(chat=True)

    def notes(**settings: Any) -> str:
        data = DataConfig(path=str(file), **settings)
        return " ".join(prepare_prompts(data, salience, tokenizer, max_length=500).notes)

    assert "the assistant's last turn is the completion" in notes()
    assert "go on from its text" not in notes()
    named = notes(prompt_column="messages")
    assert "All 2 prompts end with a message of the assistant" in named
    assert "leave --data.prompt_column out" in named


@pytest.mark.parametrize("text", ["", "the cat"])
def test_without_a_tokenizer_nothing_is_marked(text: str) -> None:
    assert written_marks(text, None) == ()
    assert not is_rendered(text, None)
