"""cagsr export: what is written loads elsewhere and is the model that was read, or nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import gguf_files
import tiny
import vllm_adapter
from cagsr.commands.main import main
from cagsr.config import ModelConfig
from cagsr.errors import ConfigError
from cagsr.models.load import load_model
from cagsr.runs import onnx
from cagsr.runs.export import compared, find_converter
from cagsr.runs.saved import answers_probe

IDS = torch.tensor([[1, 5, 7, 9]])


def export(model: Path, out: Path, *more: str) -> int:
    return main(["export", "--model", str(model), "--model.device", "cpu", "--output", str(out), *more])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_model(tmp_path_factory.mktemp("start"))
    (folder / "README.md").write_text("# A card\n")
    return folder


@pytest.fixture(scope="module")
def adapter(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(start),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model(start: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "served"
    assert export(start, out, "--dtype", dtype) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"Saved in {dtype}, loaded again and compared" in told
    weights = load_file(out / "model.safetensors")
    assert {str(one.dtype) for one in weights.values()} == {f"torch.{dtype}"}
    assert (out / "README.md").read_text() == "# A card\n"
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    before, after = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (start, out))
    tolerance = 1e-6 if dtype == "float32" else 0.2
    torch.testing.assert_close(logits(after), logits(before), atol=tolerance, rtol=tolerance)
    # Nothing is written over unasked.
    assert export(start, out) == 2
    assert "there is something already" in capsys.readouterr().err
    assert export(start, out, "--overwrite", "--dtype", dtype) == 0


def test_an_encoder_decoder(tmp_path: Path):
    assert export(tiny.save_model(tmp_path / "t5", "t5"), tmp_path / "out") == 0
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.model_type == "t5"


def test_adapters_merged_and_alone(start: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), adapter))
    assert export(adapter, tmp_path / "whole") == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), expected, atol=1e-4, rtol=1e-4
    )
    assert export(adapter, tmp_path / "alone", "--form", "adapter", "--dtype", "bfloat16") == 0
    assert "Saved in bfloat16, loaded again and compared: the likeliest token is the same at" in " ".join(
        capsys.readouterr().err.split()
    )
    weights = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert vllm_adapter.refused(tmp_path / "alone") == []
    again = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path / "alone"))
    torch.testing.assert_close(again, expected, atol=0.1, rtol=0.1)
    assert not torch.equal(again, expected)
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    assert export(start, tmp_path / "none", "--form", "adapter") == 2
    assert "is no PEFT adapter" in capsys.readouterr().err


def test_a_grown_vocabulary_goes_with_its_adapter(start: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    base, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    tokenizer.add_special_tokens({"pad_token": "<pad2>"})
    base.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out", "--form", "adapter", "--dtype", "bfloat16") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<pad2>"


def test_nothing_is_lost_by_what_is_written(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A file that is there stays until the new one is; no folder is replaced that holds the model, or a run."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    there = tmp_path / "old.gguf"
    there.write_text("old")
    assert export(start, there, "--format", "gguf", "--overwrite") == 2
    assert there.read_text() == "old"
    run = tmp_path / "run"
    model = tiny.save_model(run / "final")
    (run / "checkpoints").mkdir()
    for out, said in (
        (run, "the model"),
        (model, "the model"),
        (tmp_path / "other", "that is a run's folder"),
        (there, "a file, and a folder is to be written"),
        (there / "sub", "one of the folders above it is a file"),
    ):
        (tmp_path / "other" / "checkpoints").mkdir(parents=True, exist_ok=True)
        assert export(model, out, "--overwrite") == 2
        assert said in capsys.readouterr().err, out
    assert export(model, tmp_path / "other", "--format", "gguf", "--overwrite") == 2
    assert "--format gguf writes a file" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "final"]
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    assert export(model, Path("."), "--overwrite") == 0  # an empty folder, by a name that is none
    assert (run / "checkpoints" / "config.json").is_file()


def converter(folder: Path, gguf: Path | None) -> Path:
    """Stands in for llama.cpp's: writes a file that was made beforehand, or fails."""
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(
        "import shutil, sys\n"
        "from pathlib import Path\n"
        "source, out = Path(sys.argv[1]), sys.argv[sys.argv.index('--outfile') + 1]\n"
        "assert (source / 'config.json').is_file() and (source / 'tokenizer.json').is_file()\n"
        "assert sys.argv[sys.argv.index('--outtype') + 1] == 'q8_0'\n"
        + (
            f"shutil.copyfile({str(gguf)!r}, out)\n"
            if gguf is not None
            else "pieces = source / 'tokenizer.model'\n"
            "sys.exit(f'read {pieces.read_text()}' if pieces.exists() else 'Model LlamaX is not supported')\n"
        )
    )
    return script


def test_gguf_by_llama_cpps_converter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    source, packed, other = (tmp_path / f"{name}.gguf" for name in ("source", "packed", "other"))
    gguf_files.write(source, "F32")
    gguf_files.write(packed, "Q8_0")
    gguf_files.write(other, "Q8_0", seed=1)
    out, asked = tmp_path / "out.gguf", ("--format", "gguf", "--outtype", "q8_0")
    assert export(source, out, *asked) == 2
    assert "convert_hf_to_gguf.py is not at hand" in capsys.readouterr().err
    script = converter(tmp_path, packed)
    assert export(source, out, *asked, "--converter", str(script)) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "Written as q8_0, loaded again and compared: the likeliest token is the same at" in told
    assert out.read_bytes() == packed.read_bytes()
    converter(tmp_path, other)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert export(source, tmp_path / "wrong.gguf", *asked) == 2
    assert "is another model" in capsys.readouterr().err
    converter(tmp_path, None)
    assert export(source, tmp_path / "wrong.gguf", *asked) == 2
    assert "Model LlamaX is not supported" in capsys.readouterr().err
    # A SentencePiece vocabulary, which transformers does not write, goes along.
    model = tiny.save_model(tmp_path / "model")
    (model / "tokenizer.model").write_text("the pieces")
    assert export(model, tmp_path / "wrong.gguf", *asked) == 2
    assert "(read the pieces)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == [
        "other.gguf",
        "out.gguf",
        "packed.gguf",
        "source.gguf",
    ]


@pytest.mark.parametrize("kind", ["gemma3", "t5"])
def test_a_graph_is_asked_as_the_policy_is(tmp_path: Path, kind: str):
    """In two parts, behind a cache (of windows too) that was empty; here the model itself stands in for its graph."""
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"), for_training=False)
    model: Any = loaded.model
    texts = [((1, 5, 7, 9, 4, 8, 6), (5, 9, 9, 2, 2, 4, 4)), ((1, 9), (7, 7, 2))]
    probe = answers_probe(loaded, texts)
    example = onnx._sequence_example(model) if kind == "gemma3" else onnx._pair_example()
    assert (example["attention_mask"] == 0).any()  # else the graph would know no padding
    with torch.no_grad():
        assert not torch.isnan(model(**example).logits).any()
    torch.testing.assert_close(probe(onnx._Graph(model, model, example)).logits, probe(model).logits)


def test_onnx_answers_as_the_policy(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A row padded on the left goes on token by token behind its keys and values, in ONNX Runtime alone."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "onnx"
    assert export(start, out, "--format", "onnx", "--prompt", "tell me about the red cat") == 0
    assert (
        "Written as ONNX in float32, loaded again and compared: the likeliest token is the same at 100.0%"
        in " ".join(capsys.readouterr().err.split())
    )
    assert (out / "README.md").read_text() == "# A card\n"
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    model, session = AutoModelForCausalLM.from_pretrained(start), runtime.InferenceSession(str(out / "model.onnx"))
    ids, mask = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 6, 8, 4]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6, eos_token_id=None)
    held = {one.name: np.zeros((2, 2, 0, 8), np.float32) for one in session.get_inputs() if "past" in one.name}
    given, fed = [one.name for one in session.get_outputs()], ids
    for _ in range(6):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        asked = {"input_ids": fed.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        found = dict(zip(given, session.run(None, asked | held), strict=True))
        held = {name: found[name.replace("input.", "output.")] for name in held}
        fed = torch.from_numpy(found["logits"][:, -1:].argmax(axis=-1))
        ids, mask = torch.cat([ids, fed], dim=1), torch.cat([mask, torch.ones_like(fed)], dim=1)
    assert ids.tolist() == expected.tolist()


def test_what_does_not_go_together_and_what_is_missing(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", ModuleType("onnxscript"))
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    for flags, said in (
        (("--form", "adapter", "--format", "gguf"), "written as safetensors alone"),
        (("--format", "gguf", "--dtype", "bfloat16"), "--outtype for gguf"),
        (("--converter", "x"), "--converter is for --format gguf"),
        (("--format", "onnx"), 'needs onnx, which is not installed: pip install "cagsr[onnx]"'),
    ):
        assert export(start, tmp_path / "out", *flags) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_comparison_by_hand():
    trained = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    found = compared(
        trained, torch.tensor([[0.0, 2.0, 9.0], [0.0, 3.0, -9.0]])
    )  # a third token that filled up the vocabulary
    assert found.same_token == 0.5
    assert found.mean == pytest.approx(1.0)
    assert found.largest == pytest.approx(2.0)


def test_the_converter_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ConfigError, match="--converter"):
        find_converter(None)
    script = converter(tmp_path, None)
    script.chmod(0o755)
    assert find_converter(None) == find_converter(str(script)) == find_converter(str(tmp_path)) == script
