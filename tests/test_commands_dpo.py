"""``cagsr dpo``: what is learnt from a pair, what ends up in the folder, resuming, and bad input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cagsr.preferences.dpo as module
import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, DpoConfig, LoraConfig, ModelConfig, SftConfig
from cagsr.errors import ConfigError, DataError, ModelError, RunError
from cagsr.pairs import encode_pairs
from cagsr.preferences.dpo import train_dpo

ROWS = [
    {
        "prompt": f"tell me about the {colour} {animal} .",
        "chosen": f" the {colour} {animal} likes a house .",
        "rejected": f" the {colour} {animal} sees .",
    }
    for colour in ("red", "blue", "green")
    for animal in ("cat", "dog", "bird", "tree")
]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("start"), scale=1.0)


@pytest.fixture
def config(start: Path, tmp_path: Path) -> DpoConfig:
    return DpoConfig(
        model=ModelConfig(str(start), device="cpu"),
        data=DataConfig(str(write_rows(tmp_path / "prefs.jsonl", ROWS))),
        output_dir=str(tmp_path / "out"),
        batch_size=4,
        steps=4,
        learning_rate=1e-3,
        save_every=0,
    )


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def margin(folder: Path | str) -> float:
    """Mean log-probability of the chosen less that of the rejected answers, end token included."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def logprob(prompt: str, answer: str) -> float:
        asked = tokenizer(prompt)["input_ids"]
        ids = torch.tensor(
            [asked + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]]
        )
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None])[len(asked) - 1 :].sum())

    return sum(logprob(r["prompt"], r["chosen"]) - logprob(r["prompt"], r["rejected"]) for r in ROWS) / len(ROWS)


def test_the_folder_holds_a_model_that_prefers_the_chosen(config: DpoConfig, start: Path) -> None:
    folder = train_dpo(replace(config, steps=20), quiet=True)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "dpo.yaml"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt")) or name[0] == "." or name == "checkpoints"]
    assert margin(folder) > margin(start) + 2
    assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache is True


def test_pairs_are_encoded_as_sft_encodes_them(config: DpoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    class Spy(module._Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
            for ids, mask, answer in zip(*rows, strict=True):
                fed.append((tuple(ids[mask.bool()].tolist()), tuple(ids[answer.bool()].tolist())))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(module, "_Trainer", Spy)
    train_dpo(replace(config, steps=None, epochs=1), quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    expected = []
    for column in ("chosen", "rejected"):
        sft = SftConfig(config.model, config.data, "", completion_column=column)
        pairs, _ = encode_pairs(sft, tokenizer, None)
        expected += [((*pair.prompt, *pair.answer), tuple(pair.answer)) for pair in pairs]
    assert sorted(fed) == sorted(expected)
    assert all(answer[-1] == tokenizer.eos_token_id for _, answer in fed)


def test_the_first_loss_is_log_two_because_the_reference_is_the_start(
    config: DpoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    class Spy(module._Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

    monkeypatch.setattr(module, "_Trainer", Spy)
    for lora in (LoraConfig(), LoraConfig(r=2)):
        losses.clear()
        train_dpo(replace(config, lora=lora, overwrite=True, steps=6, learning_rate=1e-2), quiet=True)
        assert losses[0] == pytest.approx(0.6931, abs=1e-3)
        assert losses[-1] < 0.68


def test_lora_leaves_a_merged_model_and_its_adapter(config: DpoConfig, start: Path) -> None:
    folder = train_dpo(replace(config, lora=LoraConfig(r=2), learning_rate=1e-2, steps=20), quiet=True)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not (folder / "adapter" / "ref").exists()
    before, after = weights(start), weights(folder)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("_proj" in name for name in moved)
    assert margin(folder) > margin(start) + 1


def test_beta_holds_the_model_to_its_start(config: DpoConfig, start: Path, tmp_path: Path) -> None:
    def distance(beta: float) -> float:
        folder = train_dpo(replace(config, steps=20, beta=beta, output_dir=str(tmp_path / str(beta))), quiet=True)
        return margin(folder) - margin(start)

    assert distance(5.0) < distance(0.1)


@pytest.mark.parametrize("saved", [2, 5])  # within the first epoch, and within the second
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    config: DpoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    config = replace(config, steps=saved + 2)
    whole = weights(train_dpo(replace(config, output_dir=str(tmp_path / "whole")), quiet=True))

    class Stopped(module._Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == saved + 1:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    halves = replace(config, save_every=saved)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Trainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            train_dpo(halves, quiet=True)
    assert not (Path(config.output_dir) / "config.json").exists()
    resumed = weights(train_dpo(replace(halves, resume=True), quiet=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(RunError, match="finished dpo"):
        train_dpo(replace(halves, resume=True), quiet=True)


def test_what_is_refused(config: DpoConfig, tmp_path: Path) -> None:
    for changes, part in (
        ({"beta": 0.0}, "--beta"),
        ({"label_smoothing": 0.5}, "--label_smoothing"),
        ({"lora": LoraConfig(r=2, target_modules="q_proj,lm_head")}, "lm_head"),
        ({"num_pairs": 13}, "--num_pairs"),
        ({"micro_batch_size": 3}, "must divide"),
    ):
        with pytest.raises(ConfigError, match=part):
            train_dpo(replace(config, **changes), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"prefs\.jsonl, row \d+: prompt and answer are \d+ tokens long"):
        train_dpo(replace(config, max_length=8), quiet=True)
    with pytest.raises(ModelError, match="encoder-decoder"):
        train_dpo(replace(config, model=ModelConfig(str(tiny.save_model(tmp_path / "t5", "t5")))), quiet=True)
    assert not Path(config.output_dir).exists()


def test_the_command_line(config: DpoConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dpo", "--model", config.model.path, "--data", config.data.path, "--output_dir", config.output_dir]
    words += ["--steps", "1", "--batch_size", "4", "--model.device", "cpu", "--num_pairs", "8"]
    assert main(words) == 0
    assert "8 pairs" in capsys.readouterr().err
    assert main(words) == 2
    assert "holds another dpo" in capsys.readouterr().err
