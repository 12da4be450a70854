"""What a command saves is what it trained: tied matrices, precisions, and the comparison that watches over both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, LoraConfig, ModelConfig, SftConfig
from cagsr.errors import ConfigError, RunError
from cagsr.models.load import LoadedModel, load_model
from cagsr.runs import saved as module
from cagsr.runs.final import save_final
from cagsr.runs.saved import Saved, answers_probe, chosen_dtype, dtype_note

TEXTS = [([1, 4, 6, 14], [8, 9, 2]), ([1, 25, 26, 27, 4, 7], [5, 5, 13, 20])]


def trained(folder: Path, kind: str, targets: str | None, dtype: str | None = None) -> LoadedModel:
    """A model as it is after a training that moved everything it may move."""
    if dtype is not None:
        in_dtype(folder, dtype)
    lora = LoraConfig(r=0 if targets is None else 2, target_modules=targets or "all-linear")
    loaded = load_model(ModelConfig(str(folder), device="cpu"), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return loaded


def in_dtype(folder: Path, dtype: str) -> None:
    """Store a model's weights in another precision."""
    auto = AutoModelForSeq2SeqLM if "T5" in (folder / "config.json").read_text() else AutoModelForCausalLM
    auto.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)


def final(loaded: LoadedModel, run: Path, **more: Any) -> Saved:
    more = {"dtype": torch.float32, "card": lambda saved: saved.sentence} | more
    return save_final(run, loaded.model, loaded, answers_probe(loaded, TEXTS), **more)


def logits_of(model: torch.nn.Module, loaded: LoadedModel) -> torch.Tensor:
    return answers_probe(loaded, TEXTS)(model.eval()).logits


def load(folder: Path, loaded: LoadedModel, **more: Any) -> Any:
    auto = loaded.architecture.auto_class
    return auto.from_pretrained(folder, **more)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gemma3", "q_proj,lm_head"),
        ("gemma3", "q_proj,embed_tokens"),
        ("gemma3", "embed_tokens,lm_head"),
        ("gpt2", "c_attn,lm_head"),
        ("gpt2", "wte"),
        ("bart", "q_proj,lm_head"),
        ("bart", "embed_tokens"),
        ("llama", "q_proj,lm_head"),  # not tied
    ],
)
def test_an_adapter_on_a_tied_matrix_is_saved_as_it_was_trained(kind: str, targets: str, tmp_path: Path) -> None:
    start = tiny.save_model(tmp_path / "start", kind)
    tied = json.loads((start / "config.json").read_text())["tie_word_embeddings"]
    loaded = trained(start, kind, targets)
    expected = logits_of(loaded.model, loaded)
    assert (logits_of(load(start, loaded), loaded) - expected).abs().max() > 0.1, "nothing was trained"
    final(loaded, tmp_path)
    assert torch.allclose(logits_of(load(tmp_path / "final", loaded), loaded), expected, atol=1e-4)
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    assert loaded.untied == tied == any(note.startswith("Untied: ") for note in loaded.notes)
    # the adapter belongs to the stored base, whose matrices are tied
    adapted = PeftModel.from_pretrained(load(start, loaded), tmp_path / "final-adapter")
    assert torch.allclose(logits_of(adapted, loaded), expected, atol=1e-5)
    adapter = tmp_path / "final-adapter" / "adapter_model.safetensors"
    assert all("lora_" in name for name in load_file(adapter)), "the base's embeddings are in the adapter's file"


@pytest.mark.parametrize(
    ("kind", "targets", "reason"),
    [
        ("t5", "q,lm_head", "its architecture can't be saved with two; leave lm_head out"),
        ("t5", "q,embed_tokens", "can't be saved with two; leave decoder.embed_tokens and encoder.embed_tokens out"),
        ("t5", "q,shared", "never runs shared itself"),
        ("bart", "q_proj,shared", "never runs model.shared itself"),
        ("gpt2", "c_attn,head", "peft finds no such modules in this gpt2 model as head"),
    ],
)
def test_adapters_that_could_not_be_saved_or_trained_are_refused(
    kind: str, targets: str, reason: str, tmp_path: Path
) -> None:
    start = tiny.save_model(tmp_path / "start", kind)
    with pytest.raises(ConfigError, match=reason):
        load_model(ModelConfig(str(start), device="cpu"), LoraConfig(r=2, target_modules=targets))


def test_an_adapter_on_a_grown_vocabulary_loads_by_itself(tmp_path: Path) -> None:
    start = tiny.save_model(tmp_path / "start", "gemma3", pad=None)
    lora = LoraConfig(r=2, target_modules="q_proj,lm_head")
    loaded = load_model(ModelConfig(str(start), device="cpu", pad_token="<new>"), lora)
    assert loaded.grown
    expected = logits_of(loaded.model, loaded)
    final(loaded, tmp_path)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final-adapter")
    assert torch.allclose(logits_of(adapted, loaded), expected, atol=1e-5)
    assert torch.allclose(logits_of(load(tmp_path / "final", loaded), loaded), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_model_is_saved_in_the_precision_that_it_had(
    kind: str, targets: str | None, stored: str, tmp_path: Path
) -> None:
    start = tiny.save_model(tmp_path / "start", kind)
    loaded = trained(start, kind, targets, stored)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    dtype = chosen_dtype("auto", loaded)
    assert dtype == getattr(torch, stored)
    assert stored in dtype_note("auto", loaded, "--save_dtype")
    saved = final(loaded, tmp_path, dtype=dtype)
    assert f"Saved in {stored}, loaded again and compared" in saved.sentence
    assert (tmp_path / "final" / "README.md").read_text() == saved.sentence
    file = tmp_path / "final" / "model.safetensors"
    kept = (
        {torch.float32} if (kind, stored) == ("t5", "float16") else set()
    )  # transformers never has T5's wo in float16
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype, *kept}
    assert file.stat().st_size < 1.2 * (start / "model.safetensors").stat().st_size
    assert load(tmp_path / "final", loaded, dtype="auto").dtype == dtype
    # exactly the trained weights, rounded once
    again = load(tmp_path / "final", loaded, dtype=torch.float32)
    twin = loaded.model.merge_and_unload() if targets else loaded.model
    for (name, tensor), (_, other) in zip(twin.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(tensor if kept and ".wo." in name else tensor.to(dtype).float(), other), name
    if not targets:  # what was trained is as it was
        assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
        assert loaded.model.config.dtype == torch.float32


def test_another_precision_can_be_asked_for(tmp_path: Path) -> None:
    loaded = trained(tiny.save_model(tmp_path / "start"), "llama", None, "bfloat16")
    assert chosen_dtype("float32", loaded) == torch.float32
    assert "as asked" in dtype_note("float16", loaded, "--save_dtype")
    final(loaded, tmp_path, dtype=torch.float32)
    assert torch.equal(
        logits_of(load(tmp_path / "final", loaded, dtype="auto"), loaded), logits_of(loaded.model, loaded)
    )


def test_the_precision_is_read_from_the_weights_where_the_config_is_silent(tmp_path: Path) -> None:
    start = tiny.save_model(tmp_path / "start")
    in_dtype(start, "bfloat16")
    config = json.loads((start / "config.json").read_text())
    del config["dtype"]
    (start / "config.json").write_text(json.dumps(config))
    assert load_model(ModelConfig(str(start), device="cpu")).stored_dtype == torch.bfloat16


def merged_twice(model: PeftModel) -> None:
    """Make the adapted head one with the embedding again, as it was in the stored model."""
    base = model.get_base_model()
    base.lm_head.base_layer.weight = base.model.embed_tokens.weight
    base.config.tie_word_embeddings = True


def test_what_differs_is_found_kept_aside_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tiny.save_model(tmp_path / "start", "gemma3")
    loaded = trained(start, "gemma3", "q_proj,lm_head")
    earlier = final(trained(start, "gemma3", None), tmp_path)
    merged_twice(loaded.model)
    with pytest.raises(
        RunError, match=r"is not what was trained .a logit is off by .*all checkpoints stay; please report"
    ):
        final(loaded, tmp_path)
    assert (tmp_path / "final" / "README.md").read_text() == earlier.sentence, "the earlier model is gone"

    # a config that says something else than what was trained
    loaded = trained(start, "gemma3", None, "bfloat16")
    write = module._write

    def wrongly(folder: Path, *args: Any) -> None:
        write(folder, *args)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 9}))

    monkeypatch.setattr(module, "_write", wrongly)
    with pytest.raises(
        RunError, match=r"what was saved is not what was trained .a logit is off.*final-differs for a look"
    ):
        final(loaded, tmp_path, dtype=torch.bfloat16)
    assert (tmp_path / "final" / "README.md").read_text() == earlier.sentence
    assert (tmp_path / "final-differs" / "model.safetensors").exists()

    # weights that are not the trained ones
    def stale(folder: Path, model: Any, *args: Any) -> None:
        write(folder, load(start, loaded, dtype=torch.float32), *args)

    monkeypatch.setattr(module, "_write", stale)
    with pytest.raises(RunError, match=r"the weights of .* are others"):
        final(loaded, tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "_write", write)
    final(loaded, tmp_path)
    assert not (tmp_path / "final-differs").exists()


def test_a_precision_too_small_for_the_weights_loses_nothing(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path / "start")), device="cpu"))
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1e7)
    with pytest.raises(RunError, match=r"in float16 the trained model gives no numbers any more.*in float32\.$"):
        final(loaded, tmp_path, dtype=torch.float16)
    kept = load(tmp_path / "final-differs", loaded, dtype="auto")
    assert torch.equal(logits_of(kept, loaded), logits_of(loaded.model, loaded))
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="training diverged"):
        final(loaded, tmp_path)
    assert not (tmp_path / "final").exists()


# ---- the commands ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in bfloat16, with a generation config that asks for other sampling than trainings do."""
    folder = tiny.save_model(tmp_path_factory.mktemp("base"), "gemma3")
    in_dtype(folder, "bfloat16")
    # without do_sample, as several published models have it
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    return folder


def rows(path: Path, **columns: Sequence[str]) -> Path:
    many = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in many * 4))
    return path


PROMPTS = ["tell me about the red cat", "tell me about a blue dog", "the small bird sees a tree"]
GOOD = ["the red cat likes food .", "a blue dog sees the house .", "the bird sees the big tree ."]
BAD = ["the the the", "a bird .", "food food"]


def test_train_ends_with_the_model_it_trained_and_resumes_to_the_same(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "prompts.jsonl", prompt=PROMPTS)

    def train(run: str, *more: str) -> None:
        flags = "--run.batch_size 2 --num_generations 2 --max_new_tokens 4 --evaluation.held_out 1 --model.device cpu"
        flags += " --lora_r 2 --lora.target_modules q_proj,embed_tokens,lm_head --ppo.learning_rate 0.05"
        paths = ["--model", str(base), "--data", str(data), "--output_dir", str(tmp_path / run)]
        assert main(["train", *paths, *flags.split(), *more]) == 0

    train("whole", "--steps", "3")
    said = capsys.readouterr().out
    for part in (
        "To be saved in bfloat16, as the starting model is",
        "Untied: ",
        "Saved in bfloat16, loaded again",
        "top_p 0.9",
    ):
        assert part in said, part
    card = (tmp_path / "whole" / "final" / "README.md").read_text()
    assert "Saved in bfloat16" in card
    assert "Untied: " in card
    # Resumed, and in another precision, which changes nothing of the training.
    train("halves", "--steps", "2")
    train("halves", "--steps", "3", "--resume", "--run.save_dtype", "float32")
    adapters = [tmp_path / run / "final-adapter" / "adapter_model.safetensors" for run in ("whole", "halves")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    loaded = load_model(ModelConfig(str(base), device="cpu"))
    start = load(base, loaded, dtype=torch.float32)
    before = logits_of(start, loaded)
    expected = logits_of(PeftModel.from_pretrained(start, tmp_path / "whole" / "final-adapter"), loaded)
    assert (expected - before).abs().max() > 0.05, "nothing was trained"
    full = load(tmp_path / "halves" / "final", loaded, dtype="auto")
    assert full.dtype == torch.float32
    assert torch.allclose(logits_of(full, loaded), expected, atol=1e-4)
    served = load(tmp_path / "whole" / "final", loaded, dtype="auto")
    assert served.dtype == torch.bfloat16
    assert torch.equal(served.lm_head.weight, full.lm_head.weight.bfloat16())


@pytest.mark.parametrize("name", ["sft", "dpo", "reward-model"])
@pytest.mark.parametrize("lora", [[], ["--lora_r", "2", "--lora.target_modules", "q_proj,embed_tokens"]])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_the_trainers_save_what_they_trained(
    name: str, lora: list[str], computed: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"completion": GOOD} if name == "sft" else {"chosen": GOOD, "rejected": BAD}
    data = rows(tmp_path / "rows.jsonl", prompt=PROMPTS, **columns)
    out = tmp_path / "out"
    flags = ["--steps", "2", "--batch_size", "4", "--learning_rate", "0.05", "--model.device", "cpu"]
    command = [name, "--model", str(base), "--data", str(data), "--output_dir", str(out), *flags, *lora]
    assert main([*command, "--model.dtype", computed]) == 0
    said = capsys.readouterr()
    assert "Saved in bfloat16, loaded again and compared" in said.out
    assert "To be saved in bfloat16, as the starting model is" in said.out + said.err
    assert "Saved in bfloat16" in (out / "README.md").read_text()
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    if name != "reward-model":
        generation = json.loads((out / "generation_config.json").read_text())
        assert {key: generation[key] for key in ("temperature", "top_p", "eos_token_id")} == {
            "temperature": 0.6,
            "top_p": 0.9,
            "eos_token_id": 2,
        }, "sft and dpo sample nothing: they leave it as it is"
    if not lora or computed == "bfloat16":
        return
    auto = AutoModelForSequenceClassification if name == "reward-model" else AutoModelForCausalLM
    settings = {"num_labels": 1, "pad_token_id": 0} if name == "reward-model" else {}
    adapted = PeftModel.from_pretrained(
        auto.from_pretrained(base, dtype=torch.float32, **settings), out / "adapter"
    ).eval()
    full = auto.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 25, 26, 27, 4, 14]])
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits for model in (adapted, full))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_resumed_sft_of_a_tied_embeddings_adapter_ends_where_a_whole_one_does(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cagsr.sft as command

    data = rows(tmp_path / "rows.jsonl", prompt=PROMPTS, completion=GOOD)

    def config(out: str, **more: Any) -> SftConfig:
        model, lora = ModelConfig(str(base), device="cpu"), LoraConfig(r=2, target_modules="q_proj,embed_tokens")
        more = {"steps": 4, "batch_size": 4, "save_every": 2, "learning_rate": 0.05} | more
        return SftConfig(model, DataConfig(str(data)), str(tmp_path / out), lora=lora, **more)

    class Stopped(command.SFTTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    command.sft(config("whole"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(command, "SFTTrainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            command.sft(config("halves"), quiet=True)
    command.sft(config("halves", resume=True), quiet=True)
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        whole, halves = (load_file(tmp_path / out / name) for out in ("whole", "halves"))
        assert whole.keys() == halves.keys()
        assert all(torch.equal(whole[key], halves[key]) for key in whole), name


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_an_adapter_on_the_head_is_refused_where_trl_would_not_train_it(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"completion": GOOD} if name == "sft" else {"chosen": GOOD, "rejected": BAD}
    data = rows(tmp_path / "rows.jsonl", prompt=PROMPTS, **columns)
    command = [name, "--model", str(base), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--lora_r", "2", "--lora.target_modules", "q_proj,lm_head"]) == 2
    said = capsys.readouterr().err
    assert f"--lora.target_modules q_proj,lm_head: {name} (TRL) can't train an adapter on the output head" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_trainer_whose_model_differs_keeps_its_checkpoints(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "rows.jsonl", prompt=PROMPTS, completion=GOOD)
    out = tmp_path / "out"
    command = ["sft", "--model", str(base), "--data", str(data), "--output_dir", str(out), "--model.device", "cpu"]
    command += ["--steps", "2", "--batch_size", "4", "--save_every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "unlike", lambda *_: "a logit is off by 12")
        assert main(command) == 2
    assert "what was saved is not what was trained (a logit is off by 12)" in capsys.readouterr().err
    assert not (out / "config.json").exists()
    assert (out / "differs" / "model.safetensors").exists()
    assert list((out / "checkpoints").iterdir())
    assert main([*command, "--resume"]) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []
