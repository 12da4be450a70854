"""The end of a run: final model and card; and what is shown on the way: trackers, numbers, curves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vllm_adapter
from cagsr.errors import ConfigError, RunError
from cagsr.models.decoder_only import DecoderOnly
from cagsr.models.load import LoadedModel
from cagsr.runs.curves import plot_training_curves
from cagsr.runs.final import model_card, save_final
from cagsr.runs.lines import append_lines
from cagsr.runs.numbers import live_numbers
from cagsr.runs.saved import answers_probe
from cagsr.training.record import check_tracker, flat_settings, start_tracker

FACTS: dict[str, Any] = {
    "name": "run",
    "base_model": "org/base-1B",
    "data": "prompts.jsonl",
    "prompts": 12,
    "steps": 100,
    "command": "cagsr train --model.path org/base-1B",
    "settings": {"ppo.kl_coef": 0.05, "data.prompt_column": "a|b"},
    "estimator": "gae",
    "pipeline_tag": "text-generation",
    "before": {"facts covered": 0.5, "only before": 1.0},
    "after": {"facts covered": 0.625},
    "held_out": 64,
    "warnings": ["Answers have become shorter."],
    "saved": "- The trained weights.",
    "versions": {"cagsr": "1.0", "torch": "2.6"},
}


def header(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    model = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    return model, tokenizer


def save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, card: str) -> Path:
    device = torch.device("cpu")
    loaded = LoadedModel(
        model, tokenizer, "base", device, torch.float32, DecoderOnly(), (1,), isinstance(model, PeftModel), ()
    )
    probe = answers_probe(loaded, [((3, 4), (3, 1))])
    save_final(folder, model, loaded, probe, lambda saved: card, torch.float32)
    return folder / "final"


def test_card_tells_method_data_results_limits_and_how_to_repeat() -> None:
    card = model_card(**FACTS)
    assert header(card)["base_model"] == "org/base-1B"
    assert header(card)["tags"] == ["cagsr", "ppo", "self-rewarded"]
    assert header(card)["library_name"] == "transformers"
    assert "| facts covered | 0.5 | 0.625 | +0.125 |" in card
    assert "64 held-out prompts" in card
    assert "a\\|b" in card  # a pipe must not break the table
    for words in (
        "12 prompts from `prompts.jsonl`",
        "Answers have become shorter.",
        FACTS["command"],
        "- The trained weights.",
        "Versions: cagsr 1.0, torch 2.6.",
        "does not see invented",
    ):
        assert words in card


def test_card_names_no_local_folder_as_the_hubs_base_model(tmp_path: Path) -> None:
    none: dict[str, Any] = {"settings": {}, "before": {}, "after": {}, "held_out": 0, "warnings": [], "versions": {}}
    facts = {**FACTS, **none, "base_model": str(tmp_path), "estimator": "rloo", "pipeline_tag": "text2text-generation"}
    card = model_card(**facts)
    assert "base_model" not in header(card)
    assert header(card)["tags"] == ["cagsr", "rloo", "self-rewarded"]
    assert header(card)["pipeline_tag"] == "text2text-generation"
    assert "No held-out metrics" in card
    assert "None of the monitors fired." in card


def test_final_model_loads_with_tokenizer_and_generation_config(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "stale.bin").write_text("of an earlier run")
    path = save(tmp_path, model, tokenizer, "# card")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.generation_config.max_new_tokens == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(path)("a b")["input_ids"] == [3, 4]
    assert (path / "README.md").read_text() == "# card"
    assert (path / "model.safetensors").stat().st_mode & 0o044  # others may read it, as the umask says
    assert not (path / "stale.bin").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_lora_gives_a_merged_model_and_the_adapter_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    base, tokenizer = tiny()
    policy = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy.eval()
    ids = torch.tensor([[3, 4, 3]])
    expected = policy(input_ids=ids).logits
    path = save(tmp_path, policy, tokenizer, "# card")
    assert torch.equal(policy(input_ids=ids).logits, expected)
    merged = AutoModelForCausalLM.from_pretrained(path).eval()
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
    assert not torch.allclose(tiny()[0].eval()(input_ids=ids).logits, expected, atol=1e-2)
    adapted = PeftModel.from_pretrained(tiny()[0], tmp_path / "final-adapter").eval()
    assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-6)
    assert vllm_adapter.refused(tmp_path / "final-adapter", rank=8) == []
    assert vllm_adapter.refused(tmp_path / "final-adapter", rank=1) == ["r above 1"]
    assert (tmp_path / "final-adapter" / "README.md").read_text() == "# card"


def test_a_failed_save_keeps_the_earlier_final_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny()
    path = save(tmp_path, model, tokenizer, "# first")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(RunError, match="final can't be written because the disk is full"):
        save(tmp_path, model, tokenizer, "# second")
    assert (path / "README.md").read_text() == "# first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_without_its_package_says_what_to_install(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf'pip install "cagsr\[{name}\]"'):
        check_tracker(name)


def test_no_tracker(tmp_path: Path) -> None:
    assert start_tracker("none", tmp_path, {}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_into_the_run_folder(tmp_path: Path) -> None:
    tracker = start_tracker("tensorboard", tmp_path, {"ppo": {"kl_coef": 0.1, "stop": [1]}, "none": None})
    assert tracker is not None
    tracker.log({"objective/kl": 0.5}, step=1)
    tracker.finish()
    assert list((tmp_path / "trackers").rglob("events.out.tfevents.*"))


def test_settings_are_flattened_to_what_trackers_take() -> None:
    assert flat_settings({"a": {"b": 1, "c": None, "d": [1, 2]}, "e": True}) == {
        "a.b": 1,
        "a.c": "None",
        "a.d": "[1, 2]",
        "e": True,
    }


def test_live_numbers_prefer_raw_scores_and_skip_what_is_undefined() -> None:
    numbers = live_numbers({"objective/scores": 0.0, "objective/raw_scores": 0.612, "objective/kl": float("nan")})
    assert numbers == "reward 0.612"


@pytest.mark.renders
def test_curves_are_a_picture(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [
        {"step": step, "objective/scores": 0.1 * step, "rewards/coverage/mean": 0.5, "objective/kl": float("nan")}
        for step in range(50)
    ]
    rows[10]["eval/metric"] = 0.3
    append_lines(metrics, rows)
    out = plot_training_curves(metrics, tmp_path / "curves.png", "A run")
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RunError, match="no metrics to draw"):
        plot_training_curves(tmp_path / "empty.jsonl", out, "A run")
    assert out.read_bytes() == content
