"""``cagsr sft`` of encoder-decoder models: what encoder and decoder are given, what is learnt, LoRA, resuming, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, DpoConfig, LoraConfig, ModelConfig, SftConfig
from cagsr.errors import DataError, ModelError
from cagsr.models.load import load_model
from cagsr.preferences.dpo import train_dpo
from cagsr.sft import _prepare, sft

PAIRS = [("tell me about the red cat", "the cat sees a big tree ."), ("the blue dog", "a dog likes food")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("t5"), "t5", scale=1.0)


@pytest.fixture
def config(t5: Path, tmp_path: Path) -> SftConfig:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SftConfig(
        model=ModelConfig(path=str(t5), device="cpu"),
        data=DataConfig(path=str(tmp_path / "pairs.jsonl")),
        output_dir=str(tmp_path / "out"),
        batch_size=2,
        steps=2,
        save_every=0,
        learning_rate=3e-3,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict())


def said(folder: Path, prompt: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert ids[0, -1] == tokenizer.eos_token_id  # it has learnt to end
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


@pytest.mark.parametrize(("kind", "start"), [("t5", [0]), ("bart", [2]), ("mbart", [2, 5])])
def test_the_prompt_goes_to_the_encoder_and_the_answer_to_the_decoder(
    kind: str, start: list[int], config: SftConfig, tmp_path: Path
) -> None:
    folder = tiny.save_model(tmp_path / kind, kind)
    if kind == "mbart":  # every answer begins with a language
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(settings | {"forced_bos_token_id": 5}))
    loaded = load_model(ModelConfig(str(folder), device="cpu"))
    training = _prepare(config, loaded, 20)
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in PAIRS]
    answers = [[*tokenizer(answer, add_special_tokens=False)["input_ids"], 2] for _, answer in PAIRS]
    unlearnt = [-100] * (len(start) - 1)
    assert [row["input_ids"] for row in training.rows] == prompts
    assert [row["decoder_input_ids"] for row in training.rows] == [start + answer[:-1] for answer in answers]
    assert [row["labels"] for row in training.rows] == [unlearnt + answer for answer in answers]
    batch = training.trainer.keywords["data_collator"](training.rows)
    short, long = len(prompts[1]), len(prompts[0])
    assert batch["input_ids"][1].tolist() == prompts[1] + [0] * (long - short)
    assert batch["attention_mask"].tolist() == [[1] * long, [1] * short + [0] * (long - short)]
    missing = len(answers[0]) - len(answers[1])
    assert batch["labels"][1].tolist() == unlearnt + answers[1] + [-100] * missing
    # Position for position the scores are those of the pass that a reinforcement learning step reads.
    with torch.no_grad():
        model = loaded.model
        plain = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, len(unlearnt) :]
        probed = training.probe(model).logits
    both = torch.cat([plain[0, : len(answers[0])], plain[1, : len(answers[1])]])
    torch.testing.assert_close(probed, both, rtol=1e-4, atol=1e-4)


def test_two_pairs_are_learnt_by_heart_and_training_goes_on_from_there(
    config: SftConfig, t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(config.output_dir)
    line = ["sft", "--model", str(t5), "--data", config.data.path, "--output_dir", str(out), "--model.device", "cpu"]
    assert main([*line, "--steps", "120", "--batch_size", "2", "--learning_rate", "1e-2", "--save_every", "0"]) == 0
    printed = capsys.readouterr()
    assert "2 pairs from" in printed.err
    assert "training loss" in printed.out
    assert [said(out, prompt) for prompt, _ in PAIRS] == [answer for _, answer in PAIRS]
    card = (out / "README.md").read_text()
    assert "(transformers' Seq2SeqTrainer)" in card
    assert "pipeline_tag: text2text-generation\ntags: [cagsr, sft]" in card
    run = ["train", "--model", str(out), "--data", config.data.path, "--output_dir", str(tmp_path / "run")]
    run += [
        "--steps",
        "1",
        "--run.batch_size",
        "2",
        "--sampling.num_generations",
        "2",
        "--sampling.max_new_tokens",
        "6",
    ]
    assert main([*run, "--evaluation.held_out", "0", "--model.device", "cpu"]) == 0


def test_a_step_does_not_depend_on_its_micro_batches(config: SftConfig, t5: Path, tmp_path: Path) -> None:
    # The answers differ in length: a mean of means would weigh the short one's tokens more.
    settings = json.loads((t5 / "config.json").read_text()) | {"dropout_rate": 0.0}
    start = tiny.save_model(tmp_path / "start", "t5", scale=1.0)
    (start / "config.json").write_text(json.dumps(settings))
    whole = replace(
        config, model=replace(config.model, path=str(start)), steps=1, lr_scheduler="constant", warmup_ratio=0
    )
    one = weights(sft(whole, quiet=True))
    parts = weights(sft(replace(whole, micro_batch_size=1, output_dir=str(tmp_path / "parts")), quiet=True))
    for name, tensor in one.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_lora_leaves_a_merged_model_and_its_adapter(config: SftConfig, t5: Path) -> None:
    folder = sft(replace(config, lora=LoraConfig(r=2), learning_rate=1e-2), quiet=True)
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["base_model_name_or_path"]) == ("SEQ_2_SEQ_LM", str(t5))
    before, after = weights(t5), weights(folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "shared" in name or "layer_norm" in name]


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cagsr.sft as module

    whole = weights(sft(replace(config, steps=4, output_dir=str(tmp_path / "whole")), quiet=True))

    class Stopped(module.Seq2SeqTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    halves = replace(config, steps=4, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Seq2SeqTrainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            sft(halves, quiet=True)
    resumed = weights(sft(replace(halves, resume=True), quiet=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_from_scratch_follows_the_seed(config: SftConfig, t5: Path, tmp_path: Path) -> None:
    first, other = (
        weights(sft(replace(config, from_scratch=True, seed=n, steps=1, output_dir=str(tmp_path / str(n))), quiet=True))
        for n in (0, 1)
    )
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_prompt_and_answer_are_each_held_to_the_limit(config: SftConfig, t5: Path, tmp_path: Path) -> None:
    # The longest prompt has 7 tokens, the longest answer 8.
    sft(replace(config, max_length=8), quiet=True)
    config = replace(config, output_dir=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 1: the answer is 8 tokens long, the limit is 7"):
        sft(replace(config, max_length=7), quiet=True)
    with pytest.raises(ModelError, match=r"dpo \(TRL\) trains decoder-only ones; start with cagsr sft"):
        train_dpo(DpoConfig(model=config.model, data=config.data, output_dir=str(tmp_path / "dpo")), quiet=True)
