"""Loading a model: what is refused in one sentence, and what is chosen and said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from cagsr.config import LoraConfig, ModelConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.models.load import context_length, load_model

SHARED = Path(__file__).parents[2] / "shared" / "models" / "TinyStories-656K"


def one_sentence(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_missing_folder():
    with pytest.raises(ModelError, match="no such folder") as caught:
        load_model(ModelConfig("./nowhere/model"))
    assert "./nowhere/model" in one_sentence(caught.value)


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path: Path):
    tiny.save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even opened")
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model\.bin\)") as caught:
        load_model(ModelConfig(str(tmp_path)))
    assert "safetensors" in one_sentence(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    tiny.save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load_model(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_training_refuses_a_tokenizer_without_a_pad_of_its_own(tmp_path: Path, pad: str | None):
    tiny.save_model(tmp_path, pad=pad)
    with pytest.raises(ModelError, match=r"--model.pad_token '<pad>'") as caught:
        load_model(ModelConfig(str(tmp_path)))
    one_sentence(caught.value)
    reading = load_model(ModelConfig(str(tmp_path)), for_training=False)
    assert reading.pad_token_id == reading.tokenizer.eos_token_id
    assert any("EOS fills up" in note for note in reading.notes)


def test_a_new_pad_token_grows_the_embeddings(tmp_path: Path):
    tiny.save_model(tmp_path, pad=None)
    loaded = load_model(ModelConfig(str(tmp_path), pad_token="<padding>"))
    assert loaded.pad_token_id == len(tiny.SPECIAL) + len(tiny.WORDS)
    assert loaded.model.get_input_embeddings().weight.shape[0] == loaded.pad_token_id + 1
    existing = load_model(ModelConfig(str(tmp_path), pad_token="<pad>"))
    assert existing.pad_token_id == 0
    with pytest.raises(ModelError, match="this is the EOS"):
        load_model(ModelConfig(str(tmp_path), pad_token="<eos>"))


def test_device_and_precision_are_chosen_and_said(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path))))
    assert any(note.startswith("Device: ") for note in loaded.notes)
    assert any(note.startswith("Precision: ") for note in loaded.notes)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no cuda device"):
            load_model(ModelConfig(str(tmp_path), device="cuda"))


def test_dropout_is_off_also_with_gradient_checkpointing(tmp_path: Path):
    tiny.save_model(tmp_path, "bart")
    loaded = load_model(ModelConfig(str(tmp_path), gradient_checkpointing=True))
    assert any(module.training for module in loaded.model.modules())  # the checkpointed layers
    assert not any(module.training for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout))
    torch.manual_seed(0)
    ids = torch.randint(4, 20, (2, 5))
    first = loaded.model(input_ids=ids, decoder_input_ids=ids).logits
    second = loaded.model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_unknown_lora_modules(tmp_path: Path):
    tiny.save_model(tmp_path)
    with pytest.raises(ConfigError, match=r"--lora\.target_modules nothing"):
        load_model(ModelConfig(str(tmp_path)), LoraConfig(r=2, target_modules="nothing"))


def test_context_length():
    assert context_length(tiny.config("llama")) == 64
    assert context_length(tiny.config("gpt2")) == 64
    assert context_length(tiny.config("t5")) is None


def test_answers_longer_than_the_decoder_has_positions_for_are_refused(tmp_path: Path):
    bart = load_model(ModelConfig(str(tiny.save_model(tmp_path, "bart")), device="cpu"))
    assert bart.room_for_prompts(64) == 64
    with pytest.raises(ConfigError, match=r"max_new_tokens 65: the decoder of .* has positions for 64 tokens"):
        bart.room_for_prompts(65)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared with the real TinyStories model is not here")
def test_tied_embeddings_stored_as_lm_head_only_are_loaded():
    loaded = load_model(ModelConfig(str(SHARED), device="cpu"))
    model = loaded.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = loaded.tokenizer("Once upon a time, there was a little girl named", return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss
    assert float(loss.detach()) < 6.5  # random weights give log(2048) = 7.6; the tokens span several words
