"""Adapters put into their matrices for a while: the same model inside, the same bits afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import Linear

import tiny
from cagsr.config import LoraConfig, ModelConfig
from cagsr.models import merged
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.merged import merged_adapters


def adapted(folder: Path, kind: str = "llama", **lora: str) -> LoadedModel:
    """A model whose adapters say something: fresh ones are zero."""
    loaded = load_model(ModelConfig(str(tiny.save_model(folder, kind)), device="cpu"), LoraConfig(r=2, **lora))
    say_something(loaded.model)
    return loaded


def say_something(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def bits(model: torch.nn.Module) -> dict[str, tuple[int, bytes]]:
    return {
        name: (one.data_ptr(), one.detach().numpy().tobytes())
        for name, one in model.named_parameters(remove_duplicate=False)
    }


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", "embed_tokens,q_proj")]
)
def test_the_same_model_inside_and_the_same_bits_afterwards(kind: str, targets: str, tmp_path: Path) -> None:
    loaded = adapted(tmp_path, kind, target_modules=targets)
    model, before = loaded.model, bits(loaded.model)
    expected = logits_of(model)
    with model.disable_adapter():
        start = logits_of(model)
    layers = [one for one in model.modules() if isinstance(one, Linear)]

    def use() -> None:
        with merged_adapters(model):
            assert all(one.merged for one in layers)
            torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert layers
    assert (expected - start).abs().max() > 0.1, "the adapters do nothing, so the test says nothing"
    assert bits(model) == before
    assert torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), start)


def test_what_can_not_be_merged_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(model: torch.nn.Module) -> bool:
        before = bits(model)
        with merged_adapters(model):
            return bits(model) == before

    loaded = adapted(tmp_path / "lora")
    assert not untouched(loaded.model)
    plain = load_model(ModelConfig(loaded.path, device="cpu"), for_training=False).model
    dora = get_peft_model(plain, PeftLoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    say_something(dora)
    assert untouched(dora)
    with loaded.model.disable_adapter():  # the reference is the start, whoever asks
        assert untouched(loaded.model)
    with monkeypatch.context() as small:
        small.setattr(merged, "_memory", lambda device: 1024)
        assert untouched(loaded.model), "copies of more than an eighth of the memory"
    assert untouched(loaded.model.half())
