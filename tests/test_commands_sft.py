"""``cagsr sft``: what is learnt from a pair, what ends up in the folder, resuming, and bad input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from cagsr.commands.main import main
from cagsr.config import DataConfig, LoraConfig, ModelConfig, SftConfig
from cagsr.errors import CagsrError, ConfigError, DataError, ModelError, RunError
from cagsr.pairs import IGNORED, encode_pairs
from cagsr.quickstart.start_model import build_tokenizer, save_blank
from cagsr.quickstart.task import make_pairs
from cagsr.runs.trainer_folder import write_model
from cagsr.sft import sft

CHAT = (
    "{% for m in messages %}{{ 'Introduce ' if m.role == 'user' else 'Describe ' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ 'Describe' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blank")
    save_blank(folder, seed=0)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(blank: Path, tmp_path: Path) -> SftConfig:
    data = write_rows(tmp_path / "pairs.jsonl", make_pairs(24, 0))
    return SftConfig(
        model=ModelConfig(path=str(blank), device="cpu"),
        data=DataConfig(path=str(data)),
        output_dir=str(tmp_path / "out"),
        batch_size=8,
        steps=4,
        save_every=0,
        learning_rate=1e-3,
    )


def with_rows(config: SftConfig, rows: Sequence[Mapping[str, Any]]) -> SftConfig:
    write_rows(Path(config.data.path), rows)
    return config


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


# ---- pairs ----


def test_only_the_completion_and_its_end_are_learnt(config: SftConfig) -> None:
    tokenizer = build_tokenizer()
    with_rows(config, [{"prompt": "name: Mara.", "completion": " Mara is a baker."}])
    [pair], dropped = encode_pairs(config, tokenizer, None)
    prompt = tokenizer.convert_tokens_to_ids(["▁name", ":", "▁Mara", "."])
    answer = tokenizer.convert_tokens_to_ids(["▁Mara", "▁is", "▁a", "▁baker", ".", "</s>"])
    assert pair.one_sequence() == {"input_ids": prompt + answer, "labels": [IGNORED] * 4 + answer}
    assert dropped == 0


def test_a_completion_that_has_its_end_token_gets_no_second_one(config: SftConfig) -> None:
    with_rows(config, [{"prompt": "name: Mara.", "completion": " Mara.</s>"}])
    [pair], _ = encode_pairs(config, build_tokenizer(), None)
    assert pair.answer.count(build_tokenizer().eos_token_id) == 1


def test_a_conversation_is_learnt_from_where_the_generation_prompt_ends(config: SftConfig) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    row = {
        "prompt": [{"role": "user", "content": "Mara. "}],
        "completion": [{"role": "assistant", "content": "Mara is a baker."}],
    }
    [pair], _ = encode_pairs(with_rows(config, [row]), tokenizer, None)
    assert tokenizer.decode(pair.answer) == "Mara is a baker.</s>"
    assert tokenizer.decode(pair.prompt) == "Introduce Mara. Describe"


def test_long_pairs_are_refused_with_their_row_or_dropped(config: SftConfig) -> None:
    rows = [{"prompt": "name: Mara.", "completion": " Mara."}, {"prompt": "name: Mara.", "completion": " Mara" * 30}]
    with_rows(config, rows)
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 2: the pair is 35 tokens long, the limit is 20"):
        encode_pairs(config, build_tokenizer(), 20)
    pairs, dropped = encode_pairs(replace(config, long_pairs="drop"), build_tokenizer(), 20)
    assert (len(pairs), dropped) == (1, 1)
    with pytest.raises(DataError, match="all 2 pairs"):
        encode_pairs(replace(config, long_pairs="drop"), build_tokenizer(), 3)


# ---- training ----


def test_the_folder_holds_a_model_that_has_learnt(config: SftConfig, blank: Path) -> None:
    folder = sft(replace(config, steps=30), quiet=True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "sft.yaml"} <= {
        file.name for file in folder.iterdir()
    }
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pth") or file.name[0] == "."]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, _ = encode_pairs(config, tokenizer, None)

    def loss(path: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            return (
                sum(
                    float(model(**{k: torch.tensor([v]) for k, v in pair.one_sequence().items()}).loss)
                    for pair in pairs
                )
                / 24
            )

    assert loss(folder) < loss(blank) - 1.0
    assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache is True


def test_from_scratch_needs_no_weights_and_follows_the_seed(config: SftConfig, blank: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((blank / name).read_bytes())
    (bare / "tokenizer.model").write_text(
        "pieces"
    )  # of SentencePiece: transformers does not write it, and llama.cpp reads it
    scratch = replace(config, model=replace(config.model, path=str(bare)), from_scratch=True, steps=1)
    folder = sft(scratch, quiet=True)
    assert (folder / "tokenizer.model").read_text() == "pieces"
    first = weights(folder)
    again = weights(sft(replace(scratch, overwrite=True), quiet=True))
    other = weights(sft(replace(scratch, output_dir=str(tmp_path / "other"), seed=1), quiet=True))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_lora_leaves_a_merged_model_and_its_adapter(config: SftConfig, blank: Path) -> None:
    folder = sft(replace(config, lora=LoraConfig(r=2), learning_rate=1e-2), quiet=True)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    before, after = weights(blank), weights(folder)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("_proj" in name for name in moved)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cagsr.sft as module

    whole = weights(sft(replace(config, steps=4, output_dir=str(tmp_path / "whole")), quiet=True))

    class Stopped(module.SFTTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    halves = replace(config, steps=4, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "SFTTrainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            sft(halves, quiet=True)
    assert not (Path(config.output_dir) / "config.json").exists()
    with pytest.raises(RunError, match="--resume"):
        sft(halves, quiet=True)
    with pytest.raises(RunError, match=r"was started with other values of learning_rate, seed:"):
        sft(replace(halves, resume=True, learning_rate=2e-3, seed=1, save_every=3), quiet=True)
    # killed while it wrote another checkpoint
    half = Path(config.output_dir) / "checkpoints" / "checkpoint-3"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"")
    (half / "trainer_state.json").write_text('{"global_st')
    resumed = weights(sft(replace(halves, resume=True), quiet=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(RunError, match="finished"):
        sft(replace(halves, resume=True), quiet=True)


def test_further_chat_templates_are_written_and_replaced(tmp_path: Path) -> None:
    def fill(folder: Path, text: str) -> Any:
        templates = folder / "additional_chat_templates"
        templates.mkdir()
        (templates / "tool_use.jinja").write_text(text)
        (folder / "README.md").write_text("card")

    for text in ("first", "second"):
        write_model(tmp_path, partial(fill, text=text))
    templates = tmp_path / "additional_chat_templates"
    assert (templates / "tool_use.jinja").read_text() == "second"
    assert templates.stat().st_mode & 0o100  # others than root can look into it
    assert {path.name for path in tmp_path.iterdir()} == {"additional_chat_templates", "README.md"}


# ---- bad input ----


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (
            [{"prompt": "name: Mara.", "answer": "x"}],
            "row 1: no column 'completion' (columns besides the prompt: answer)",
        ),
        ([{"prompt": "name: Mara.", "completion": " "}], "row 1: the completion (column 'completion') is empty"),
        ([{"completion": "x"}], "row 1: no column 'prompt'"),
        ([{"prompt": "name: Mara.", "completion": ["x"]}], "must be text too"),
        ([], "no rows"),
    ],
)
def test_rows_that_are_no_pairs(config: SftConfig, rows: list[dict[str, Any]], part: str) -> None:
    with pytest.raises(DataError) as caught:
        sft(with_rows(config, rows), quiet=True)
    assert part in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_models_that_can_not_be_used(config: SftConfig, blank: Path, tmp_path: Path) -> None:
    def refusal(path: Path, **changes: Any) -> str:
        with pytest.raises(CagsrError) as caught:
            sft(replace(config, model=replace(config.model, path=str(path)), **changes), quiet=True)
        assert isinstance(caught.value, ModelError)
        return str(caught.value)

    assert "no such folder" in refusal(tmp_path / "nowhere")
    build_tokenizer().save_pretrained(tmp_path / "pickle")
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "pickle")
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights" in refusal(tmp_path / "pickle")
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing", from_scratch=True)
    same = tmp_path / "same"
    save_blank(same, seed=0)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(same)
    assert "as PAD" in refusal(same)
    assert "cagsr-scratch" not in refusal(same, from_scratch=True)


def test_folders_and_settings_that_can_not_be_used(config: SftConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"no cagsr sft"):
        sft(replace(config, output_dir=str(other), overwrite=True), quiet=True)
    assert (other / "thesis.txt").exists()
    for changes, part in (
        ({"micro_batch_size": 3}, "must divide"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"max_length": 10_000}, "context"),
        ({"steps": 0}, "--steps"),
        ({"seed": -1}, "--seed -1: must lie between 0 and 4294967295"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"data": replace(config.data, streaming=True)}, "streaming"),
    ):
        with pytest.raises(ConfigError, match=part):
            sft(replace(config, **changes), quiet=True)  # type: ignore[arg-type]


def test_the_command_line_reports_progress_and_errors(config: SftConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sft", "--model", config.model.path, "--data", config.data.path, "--output_dir", config.output_dir]
    assert main([*words, "--steps", "1", "--batch_size", "4", "--model.device", "cpu"]) == 0
    assert "24 pairs" in capsys.readouterr().err
    assert main(words) == 2
    assert "holds another sft" in capsys.readouterr().err
