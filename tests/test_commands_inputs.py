"""What people have in their files, through the whole command line: numbers as answers, broken characters, OpenAI's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cagsr.commands.main import main
from prompts_tokenizers import byte_bpe

TRAINER = ["--steps", "1", "--batch_size", "2", "--save_every", "0"]
SHORT = ["--sampling.max_new_tokens", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has a token for every byte, and a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_bpe(chat=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **ends)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_csv_of_numbers_is_scored_and_judged(model: str, tmp_path: Path, out: str) -> None:
    file = tmp_path / "n.csv"
    file.write_text("prompt,completion,reference,mine\nWhat is 12+30?,42,42,042\nthe cat is,1.50,1.50,7\n")
    assert main(["score", "--model", model, "--data", str(file), "--output", out]) == 0
    assert [row["completion"] for row in rows(out)] == ["42", "1.50"]
    argv = ["score", "--model", model, "--data", str(file), "--response_column", "mine", "--output", out]
    assert main(argv) == 0
    assert [row["completion"] for row in rows(out)] == ["042", "7"]
    assert main(["eval", "--answers", str(file), "--output", out]) == 0
    assert "rouge_l" in Path(out).read_text()
    assert main(["eval", "--model", model, "--data", str(file), *SHORT, "--output", out]) == 0
    assert "rouge_l" in Path(out).read_text()


@pytest.mark.parametrize("command", ["sft", "dpo", "reward-model"])
def test_a_csv_of_numbers_is_trained_on(model: str, tmp_path: Path, out: str, command: str) -> None:
    file = tmp_path / "n.csv"
    file.write_text("prompt,completion,chosen,rejected\nWhat is 12+30?,42,42,43\nthe cat is,1.50,7,07\n")
    more = ["--held_out", "0"] if command == "reward-model" else []
    assert main([command, "--model", model, "--data", str(file), "--output_dir", out, *TRAINER, *more]) == 0


def test_numbers_as_references_judge_a_run(
    model: str, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "n.csv"
    file.write_text("prompt,reference\n" + "".join(f"What is {n}+30?,{n + 30}\n" for n in range(8)))
    small = ["--steps", "1", "--run.batch_size", "2", "--num_generations", "2", "--evaluation.held_out", "2"]
    assert main(["train", "--model", model, "--data", str(file), "--output_dir", out, *small, *SHORT]) == 0
    assert "held out, judged by ROUGE-L" in " ".join(capsys.readouterr().out.split())


def test_half_a_surrogate_pair_is_one_sentence_wherever_it_stands(
    model: str, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        json.dumps({"prompt": "the cat", "completion": "a \ud83d", "chosen": "a", "rejected": "\ud83d"}) + "\n"
    )
    data = ["--data", str(file)]
    for argv in (
        ["generate", "--model", model, *data, "--keep_columns", "--output", out],
        ["score", "--model", model, *data, "--output", out],
        ["eval", "--answers", str(file), "--output", out],
        ["sft", "--model", model, *data, "--output_dir", out],
        ["dpo", "--model", model, *data, "--output_dir", out],
        ["train", "--model", model, *data, "--output_dir", out, *SHORT],
        ["synthesize", *data, "--output", out],
    ):
        assert main(argv) == 2, argv
        said = capsys.readouterr().err
        assert "p.jsonl, row 1: column 'completion' holds half a surrogate pair" in said, argv
        assert not Path(out).exists()
    assert main(["generate", "--model", model, "--prompt", "the \udcff cat"]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_openai_rows_are_pairs_for_every_command(
    model: str, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    file.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": [*talk, *talk]}) + "\n")
    assert main(["score", "--model", model, "--data", str(file), "--output", out]) == 0
    assert [(row["prompt"], row["completion"]) for row in rows(out)] == [(talk[:1], "sat"), ([*talk, talk[0]], "sat")]
    assert "the assistant's last turn is the completion" in " ".join(capsys.readouterr().err.split())
    assert main(["sft", "--model", model, "--data", str(file), "--output_dir", str(tmp_path / "sft"), *TRAINER]) == 0
    assert "the assistant's last turn is the completion" in " ".join("".join(capsys.readouterr()).split())


def test_tools_and_template_settings_go_where_their_prompt_goes(model: str, tmp_path: Path, out: str) -> None:
    """Answers that are written without them would be scored under another prompt."""
    file = tmp_path / "p.jsonl"
    more = {"tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"mode": "x"}}
    row = {"prompt": [{"role": "user", "content": "the cat sat"}], "completion": "on the mat, a dog", "mine": 1, **more}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "completion": "and a small brown one"}) + "\n")
    assert main(["generate", "--model", model, "--data", str(file), "--output", out, *SHORT]) == 0
    assert {name: rows(out)[0].get(name) for name in (*more, "mine")} == {**more, "mine": None}
    assert main(["synthesize", "--data", str(file), "--output", out]) == 0
    assert {name: rows(out)[0][name] for name in more} == more
