"""A model's folder: files that are no whole files, weights that are another model's, adapters, fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from cagsr.commands.main import main
from cagsr.config import ModelConfig
from cagsr.errors import ModelError
from cagsr.models.files import check_files, fingerprint_model, weight_files
from cagsr.models.load import load_model
from cagsr.reward.model import load_reward_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path) -> torch.nn.Module:
    return load_model(ModelConfig(str(folder), device="cpu"), for_training=False).model


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_git_lfs_pointer_is_called_one_before_anything_is_opened(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"^--model\.path .*: {name} is a Git LFS pointer.*git lfs pull"):
        load(folder)


def test_every_command_that_loads_a_model_says_so(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    data = tiny.save_prompts(tmp_path / "p.jsonl")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a cat", "completion": "a dog", "chosen": "a", "rejected": "the"}) + "\n")
    short = ["--sampling.max_new_tokens", "4"]
    good, bad, out = ["--model", str(whole), *short], ["--model", str(folder)], ["--output_dir", str(tmp_path / "out")]
    for argv in (
        ["generate", *bad, "--prompt", "a cat"],
        ["score", *bad, "--data", str(pairs)],
        ["rank", *bad, "--data", str(data)],
        ["sft", *bad, "--data", str(pairs), *out],
        ["dpo", *bad, "--data", str(pairs), *out],
        ["reward-model", *bad, "--data", str(pairs), *out],
        ["train", *good, "--data", str(data), *out, "--reward.models", str(folder)],
        ["eval", *good, "--data", str(data), "--against", str(folder)],
        ["eval", *good, "--data", str(data), "--judge_model", str(folder)],
        ["eval", *good, "--data", str(data), "--reward_model", str(folder)],
    ):
        assert main(argv) == 2, argv
        assert "model.safetensors is a Git LFS pointer" in capsys.readouterr().err, argv
    assert not (tmp_path / "out").exists()


def test_weights_that_were_cut_short_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for part in (content[: len(content) // 2], content[:4], b""):
        file.write_bytes(part)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged or was cut short"):
            load(folder)
        with pytest.raises(ModelError, match=r"^reward\.models: .*model\.safetensors is damaged or was cut short"):
            load_reward_model(str(folder), "cpu")


def test_each_part_of_divided_weights_is_looked_at(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    parts = weight_files(folder)
    assert len(parts) > 1
    load(folder)
    kept = parts[1].read_bytes()
    parts[1].write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{parts[1].name} is a Git LFS pointer"):
        load(folder)
    parts[1].write_bytes(kept[:-1])
    with pytest.raises(ModelError, match=rf"{parts[1].name} is damaged"):
        load(folder)
    parts[1].unlink()
    with pytest.raises(ModelError, match=rf"{parts[1].name} is missing"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is a Git LFS pointer"):
        load(folder)


def test_weights_of_other_sizes_than_the_config_says_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=64)
    with pytest.raises(ModelError, match=r"down_proj\.weight: 32 x 48 in the file, 32 x 64 by the config and 5 more"):
        load(folder)


def test_weights_that_would_be_random_are_refused_and_unused_ones_are_said(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no weights for 'model\.layers\.2\.\S+' and 8 more, which would be random"):
        load(folder)
    change_config(folder, num_hidden_layers=1)
    notes = load_model(ModelConfig(str(folder), device="cpu")).notes
    assert any("9 in the file have no place in this model and are left out (model.layers.1." in note for note in notes)


def test_a_reward_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    settings = tiny.config("llama")
    settings.num_labels = 1
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    load_reward_model(str(tmp_path), "cpu")
    change_config(tmp_path, intermediate_size=64)
    with pytest.raises(ModelError, match=r"^reward\.models: .*its weights have other sizes"):
        load_reward_model(str(tmp_path), "cpu")


# ---- adapters ----


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of ``folder`` that changes the model."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_on_its_base_and_merged(adapter: Path, folder: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    loaded = load_model(ModelConfig(str(adapter), device="cpu"))
    ids = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        found, plain = loaded.model(ids).logits, load(folder)(ids).logits
        expected = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert f"{adapter} is a PEFT adapter: loaded on its base {folder} and merged into it." in loaded.notes
    assert not any("lora" in name for name in loaded.model.state_dict())
    assert loaded.tokenizer.pad_token == "<pad>"  # the base's


def test_an_adapter_on_a_tied_head_makes_the_two_uses_apart(folder: Path, tmp_path: Path) -> None:
    """Merged into the one matrix it would change the embedding too."""
    settings = tiny.config("llama")
    settings.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    policy.save_pretrained(tmp_path / "adapter")
    loaded = load_model(ModelConfig(str(tmp_path / "adapter"), device="cpu"))
    ids = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, policy(ids).logits, atol=1e-4, rtol=1e-4)
    assert loaded.untied
    assert any(note.startswith("Untied: ") for note in loaded.notes)


def test_a_merge_that_makes_another_model_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: torch.nn.Module, **_: object) -> torch.nn.Module:
        return self.unload()

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", wrong)
    with pytest.raises(ModelError, match="merged into it is another model"):
        load(adapter)


def test_the_adapters_own_tokenizer_comes_first(adapter: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["owl"])
    tokenizer.save_pretrained(adapter)
    loaded = load_model(ModelConfig(str(adapter), device="cpu"))
    assert len(loaded.tokenizer) == loaded.model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_an_adapter_that_can_not_be_used_is_one_sentence(adapter: Path, folder: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_text(POINTER)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        load(adapter)
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"not even opened")
    with pytest.raises(ModelError, match=r"pickled weights are never loaded"):
        load(adapter)
    weights.write_bytes(kept)
    with pytest.raises(ModelError, match=r"^reward\.models: .* is a PEFT adapter; give the folder of the merged"):
        load_reward_model(str(adapter), "cpu")
    change_config(folder, hidden_size=64)
    with pytest.raises(ModelError, match=r"adapter for .*, and its base can't be loaded \(.*other sizes"):
        load(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for base, part in (("./no/such/folder", "no such folder"), (None, "names no base model")):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=part):
            load(adapter)


# ---- fingerprints ----


def test_a_fingerprint_sees_every_tensor_and_the_texts(folder: Path, adapter: Path, tmp_path: Path) -> None:
    first = fingerprint_model(str(folder))
    assert first == fingerprint_model(str(shutil.copytree(folder, tmp_path / "copy")))
    weights = load_file(folder / "model.safetensors")
    seen = {first}
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        other = {key: value + 1e-3 if key == name else value for key, value in weights.items()}
        save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
        seen.add(fingerprint_model(str(folder)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_model(str(folder)) == first
    of_adapter = fingerprint_model(str(adapter))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(fingerprint_model(str(folder)))
    assert len(seen) == 5
    assert fingerprint_model(str(adapter)) not in (of_adapter, None)  # its base has changed
    assert fingerprint_model("nobody/has-this-cached") is None


def test_a_large_tensor_is_sampled_at_three_places(tmp_path: Path) -> None:
    values = torch.zeros(100_000)
    found = set()
    for place in (None, 0, 50_000, 99_999, 20_000):
        other = values.clone()
        if place is not None:
            other[place] = 1.0
        save_file({"w": other}, tmp_path / "model.safetensors")
        found.add(fingerprint_model(str(tmp_path)))
    assert len(found) == 4  # all but one number far from the three places: nothing that trains changes just that


def test_a_hub_id_and_an_empty_folder_hold_nothing_to_check(tmp_path: Path) -> None:
    check_files("org/model", "x")
    check_files(str(tmp_path), "x")
