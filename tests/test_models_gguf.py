"""GGUF files as models: what is loaded, what is said, what is saved after a training, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_files
import tiny
from cagsr.commands.main import main
from cagsr.config import LoraConfig, ModelConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.models.files import fingerprint_model
from cagsr.models.load import load_model

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write(path)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(0, 300, 9)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def load(path: Path, **more: Any) -> Any:
    return load_model(ModelConfig(str(path), device="cpu", **more))


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("Q8_0", torch.float32)])
def test_the_model_is_the_one_that_was_written(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / f"a-{kind}.gguf"
    source = gguf_files.write(file, kind)
    for path in (file, tmp_path):
        loaded = load(path)
        assert f"GGUF: {file} ({kind}), its weights dequantised to float32." in loaded.notes
        torch.testing.assert_close(logits(loaded.model), logits(source), rtol=1e-5, atol=1e-5)
        assert loaded.stored_dtype == dtype
        assert loaded.model.dtype == torch.float32
    text = "tell me about the red cat"
    assert loaded.tokenizer(text)["input_ids"] == gguf_files.tokenizer().encode(text).ids
    assert len(loaded.tokenizer) == gguf_files.tokenizer().get_vocab_size()  # the model has no rows for more
    assert loaded.tokenizer.pad_token_id == 0
    assert loaded.stop_ids == (2,)


def test_the_file_that_was_named_is_read_wherever_one_stands(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    gguf_files.write(tmp_path / "here" / file.name, seed=1)
    expected = logits(load(file).model)
    monkeypatch.chdir(tmp_path / "here")  # another one of that name lies in the working directory
    assert torch.equal(logits(load(file).model), expected)
    assert not torch.equal(logits(load(Path(file.name)).model), expected)


def test_a_run_and_what_it_saves(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tiny.save_prompts(tmp_path / "p.jsonl", 6), tmp_path / "run"
    short = ["--sampling.max_new_tokens", "4"]
    line = ["train", "--model", str(file), "--data", str(data), "--output_dir", str(run), "--lora.r", "2"]
    line += ["--run.batch_size", "2", "--sampling.num_generations", "2", *short]
    line += ["--evaluation.held_out", "2", "--model.device", "cpu", "--run.save_every", "1"]
    assert main([*line, "--steps", "1"]) == 0
    assert f"GGUF: {file} (F32)" in capsys.readouterr().out
    final = AutoModelForCausalLM.from_pretrained(run / "final")
    assert "quantization_config" not in json.loads((run / "final" / "config.json").read_text())
    assert final.config.vocab_size == len(AutoTokenizer.from_pretrained(run / "final")) == len(load(file).tokenizer)
    adapter = json.loads((run / "final-adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(file)
    adapted = load(run / "final-adapter").model
    torch.testing.assert_close(logits(adapted), logits(final), rtol=1e-4, atol=1e-4)
    assert main([*line, "--steps", "2", "--resume"]) == 0
    answers = ["rank", "--model", str(run / "final"), "--data", str(data), "--reward_from", str(run)]
    assert main([*answers, "--output", str(tmp_path / "best.jsonl"), "--sampling.num_generations", "2", *short]) == 0


def test_sft_saves_a_plain_model_in_the_files_precision(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "half.gguf", "F16")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a cat", "completion": " the dog"}) + "\n")
    line = [
        "sft",
        "--model",
        str(tmp_path),
        "--data",
        str(pairs),
        "--output_dir",
        str(tmp_path / "out"),
        "--steps",
        "1",
    ]
    assert main([*line, "--batch_size", "1", "--model.device", "cpu"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_what_counts_as_another_model(file: Path, tmp_path: Path) -> None:
    copied = shutil.copy(file, tmp_path / "b.gguf")
    assert fingerprint_model(str(file)) == fingerprint_model(str(copied)) == fingerprint_model(str(tmp_path))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    Path(copied).write_bytes(content)
    assert fingerprint_model(str(copied)) != fingerprint_model(str(file))


def test_what_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(path: Path, error: type[Exception] = ModelError) -> str:
        with pytest.raises(error) as caught:
            load(path)
        assert str(caught.value).startswith(f"--model.path {path}: ")
        return str(caught.value)

    assert "no such file" in refusal(tmp_path / "nowhere.gguf")
    for name in ("a.gguf", "b.GGUF"):
        shutil.copy(file, tmp_path / name)
    assert f"several GGUF files (a.gguf, b.GGUF); name one, as {tmp_path / 'a.gguf'}." in refusal(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"none")
    assert "a.gguf is no GGUF file" in refusal(tmp_path / "a.gguf")
    shutil.copy(file, tmp_path / "c-00001-of-00002.gguf")
    assert "is one part of a model" in refusal(tmp_path / "c-00001-of-00002.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-5000])
    assert "cut" in refusal(tmp_path / "cut.gguf")
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a.gguf is a Git LFS pointer" in refusal(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'a GGUF file needs gguf, which is not installed: pip install "cagsr[gguf]".' in refusal(file, ConfigError)


def test_adapters_train_on_it(file: Path) -> None:
    loaded = load_model(ModelConfig(str(file), device="cpu"), LoraConfig(r=2))
    assert {parameter.requires_grad for parameter in loaded.model.parameters()} == {True, False}
