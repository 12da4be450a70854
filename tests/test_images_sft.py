"""``cagsr sft`` on rows with images: what is learnt is what transformers reads of each pair alone, and the folder sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import seeing
from cagsr.commands.main import main
from cagsr.config import DataConfig, ModelConfig, SftConfig
from cagsr.models.load import LoadedModel, load_model
from cagsr.pairs import IGNORED, encode_pairs
from cagsr.sft import _collate_with_images


@pytest.fixture(scope="module", params=seeing.KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = seeing.save_model(tmp_path_factory.mktemp("taught") / request.param, request.param)
    return load_model(ModelConfig(str(folder), device="cpu"))


def write_pairs(folder: Path, kind: str) -> tuple[Path, list[dict[str, Any]]]:
    """A plain pair with two images and a conversation with one (mllama: two), whose answers differ in length."""
    for name, colour, size in (("a.png", "red", (24, 24)), ("b.png", "blue", (32, 20))):
        seeing.picture(colour, size).save(folder / name)
    rows: list[dict[str, Any]] = [
        {"prompt": "tell me about the cat", "images": ["a.png", "b.png"], "completion": " a cat"},
        {
            "messages": [
                {"role": "user", "content": "the big red house near the tree"},
                {"role": "assistant", "content": "the dog likes the small bird"},
            ],
            "images": ["b.png", "a.png"][: 2 if kind == "mllama" else 1],
        },
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_a_batch_is_what_the_model_reads_of_each_pair_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    """Images in their order, placeholders expanded once, other lengths, one of them a conversation: only answers are learnt."""
    path, rows = write_pairs(tmp_path, Path(loaded.path).name)
    config = SftConfig(ModelConfig(loaded.path), DataConfig(str(path)), str(tmp_path / "out"))
    pairs, _ = encode_pairs(config, loaded.tokenizer, None, None, loaded.architecture, loaded.vision)
    batch = _collate_with_images([{"pair": 1}, {"pair": 0}], pairs, loaded)
    with torch.no_grad():
        logits = loaded.model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    for row, pair in enumerate((pairs[1], pairs[0])):
        learnt = batch["labels"][row] != IGNORED
        assert batch["labels"][row][learnt].tolist() == pair.answer
        said = loaded.tokenizer.decode(pair.answer)
        assert said == ("the dog likes the small bird <eos>", "a cat <eos>")[row]
        assert pair.seen is not None
        images = [one.source for one in pair.seen.prompt.images]
        assert [Path(one).name for one in images] == rows[1 - row]["images"]
        output, width = seeing.alone(loaded, loaded.model, pair.seen.prompt, pair.answer)
        assert width == len(pair.prompt)
        found = logits[row, : width + len(pair.answer)][width - 1 : -1]
        torch.testing.assert_close(found, output.logits[0, width - 1 : -1], atol=2e-4, rtol=1e-4)


def test_a_start_is_taught_and_goes_on(tmp_path: Path) -> None:
    """From random weights, then an adapter on it; ``final/`` has what reads images, and ``train`` takes it as it is."""
    model = seeing.save_model(tmp_path / "model", "llava", scale=1.0)
    path, _ = write_pairs(tmp_path, "llava")
    start, adapted = tmp_path / "start", tmp_path / "adapted"
    common = ["--data.path", str(path), "--model.device", "cpu", "--batch_size", "2", "--save_every", "0"]
    blank = ["--from_scratch", "--steps", "30", "--learning_rate", "1e-2"]
    assert main(["sft", "--model.path", str(model), *common, *blank, "--output_dir", str(start)]) == 0
    lora = ["--lora.r", "2", "--lora.target_modules", "q_proj,v_proj", "--steps", "2", "--micro_batch_size", "1"]
    assert main(["sft", "--model.path", str(start), *common, *lora, "--output_dir", str(adapted)]) == 0
    assert any("vision_tower" in name for name in load_file(adapted / "adapter" / "adapter_model.safetensors"))
    for folder in (start, adapted):
        assert {"processor_config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    AutoModelForImageTextToText.from_pretrained(adapted)
    made = tmp_path / "made.jsonl"
    asked = ["--data.path", str(path), "--output", str(made), "--sampling.temperature", "0"]
    assert main(["generate", "--model.path", str(start), "--model.device", "cpu", *asked]) == 0
    said = [json.loads(line)["completion"].strip() for line in made.read_text().splitlines()]
    assert said == ["a cat", "the dog likes the small bird"]
