"""The output layer run on a few positions at a time: the numbers and gradients of the plain logits, without their size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM

import tiny
from cagsr.config import LoraConfig, ModelConfig, SamplingConfig
from cagsr.models import output_layer
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.logit_rule import LogitRule
from cagsr.models.token_pass import token_statistics
from cagsr.scoring.statistics import certainty_of, entropy_of, logprobs_and, readings_of

SIZES: dict[str, Any] = {
    "vocab_size": 28, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RULES = {
    "gemma2": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0), LogitRule(1.0, 3.0)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), LogitRule(1 / 8)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), LogitRule(0.25)),
}
KINDS = ["llama", "gemma3", "gpt2", "t5", "bart", *RULES]


def save(folder: Path, kind: str) -> Path:
    if kind not in RULES:
        return tiny.save_model(folder, kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RULES[kind][0])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def loaded_from(folder: Path, lora: LoraConfig | None = None, dtype: Any = "float32") -> LoadedModel:
    loaded = load_model(ModelConfig(str(folder), device="cpu", dtype=dtype), lora)
    with torch.no_grad():  # fresh adapters add nothing
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return loaded


def batch() -> tuple[PassInputs, torch.Tensor]:
    """Three rows, padded on either side, and the tokens whose numbers are wanted: not all that are real."""
    generator = torch.Generator().manual_seed(1)
    prompts, answers = (torch.randint(3, 28, (3, width), generator=generator) for width in (4, 6))
    real = torch.arange(6)[None] < torch.tensor([[6], [3], [5]])
    at = real.clone()
    at[0, 2:4] = False
    return PassInputs(prompts, torch.ones_like(prompts, dtype=torch.bool), answers, real), at


def plain(loaded: LoadedModel, inputs: PassInputs, temperature: float) -> torch.Tensor:
    logprobs = (loaded.teacher_forced(inputs).float() / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, inputs.response_ids[..., None])[..., 0]
    return torch.stack([chosen, entropy_of(logprobs), certainty_of(logprobs)], dim=-1)


def gradients(loaded: LoadedModel, found: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    loaded.model.zero_grad()
    (found * weights).sum().backward()
    return {name: one.grad.clone() for name, one in loaded.model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("block", [1, 4 * 28, 2**22])
@pytest.mark.parametrize("adapted", ["", "all-linear", "lm_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_every_gradient_are_those_of_the_plain_logits(
    kind: str, adapted: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if adapted and (block == 1 or kind in ("gpt2", "cohere") or (kind, adapted) == ("t5", "lm_head")):
        pytest.skip("seen without adapters, or refused")
    monkeypatch.setitem(output_layer.NUMBERS_AT_ONCE, "cpu", block)
    lora = LoraConfig(r=2, target_modules=adapted) if adapted else None
    loaded = loaded_from(save(tmp_path, kind), lora)
    if kind == "bart":
        base = loaded.model.get_base_model() if lora else loaded.model
        base.final_logits_bias.copy_(torch.linspace(-2, 2, 28))
    inputs, at = batch()
    expected = plain(loaded, inputs, 0.7)
    wanted = gradients(loaded, expected[at])
    statistics = logprobs_and(entropy_of, certainty_of, temperature=0.7)
    found = loaded.token_statistics(inputs, statistics, at)
    torch.testing.assert_close(found[at], expected[at], rtol=1e-5, atol=1e-5)
    assert (found[~at] == 0).all()
    moved = gradients(loaded, found[at])
    assert wanted.keys() == moved.keys()
    for name, one in wanted.items():  # sums in another order, which processors round differently: up to 7e-6 seen
        torch.testing.assert_close(moved[name], one, rtol=1e-4, atol=2e-5 * max(1.0, float(one.abs().max())))
    head = loaded.model.get_output_embeddings()
    assert (
        float(sum(one.grad.abs().sum() for one in head.parameters() if one.requires_grad)) > 0
        or adapted == "all-linear"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded.token_statistics(inputs, statistics, at), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", RULES)
def test_what_a_model_does_with_its_numbers_is_asked_of_it(kind: str, tmp_path: Path):
    loaded = loaded_from(save(tmp_path, kind))
    rule = RULES[kind][1]
    assert loaded.logit_rule == rule
    assert not [note for note in loaded.notes if note.startswith("Logits:")]
    changed = AutoModelForCausalLM.from_config(RULES[kind][0]).eval()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if hasattr(changed.config, name):
            setattr(changed.config, name, 5.0)  # what the forward pass reads, or not
    assert LoadedModel(
        changed, loaded.tokenizer, "", loaded.device, torch.float32, loaded.architecture, (2,), False, ()
    ).logit_rule in {LogitRule(1.0, 5.0), LogitRule(1 / 5), None}


def test_a_model_with_logits_of_its_own_is_told_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    genuine = LlamaForCausalLM.forward

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = genuine(self, *args, **kwargs)
        output.logits = output.logits - output.logits.square() / 50
        return output

    own.__signature__ = inspect.signature(genuine)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", own)
    loaded = loaded_from(save(tmp_path, "llama"))
    assert loaded.logit_rule is None
    assert [note for note in loaded.notes if "makes them in a way of its own" in note]
    inputs, at = batch()
    monkeypatch.setitem(output_layer.NUMBERS_AT_ONCE, "cpu", 3 * 28)
    expected = plain(loaded, inputs, 1.0)
    wanted = gradients(loaded, expected[at])
    found = loaded.token_statistics(inputs, logprobs_and(entropy_of, certainty_of, temperature=1.0), at)
    torch.testing.assert_close(found[at], expected[at], rtol=1e-5, atol=1e-5)
    for name, one in gradients(loaded, found[at]).items():
        torch.testing.assert_close(one, wanted[name], rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("rank", [0, 2])
def test_bfloat16_is_that_of_the_plain_logits(rank: int, tmp_path: Path):
    loaded = loaded_from(save(tmp_path, "llama"), LoraConfig(r=rank), "bfloat16")
    inputs, at = batch()
    with loaded.autocast():
        expected = plain(loaded, inputs, 1.0)
        found = loaded.token_statistics(inputs, logprobs_and(entropy_of, certainty_of, temperature=1.0), at)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[at], expected[at], rtol=1e-2, atol=1e-2)
    wanted = gradients(loaded, expected[at])
    for name, one in gradients(loaded, found[at]).items():
        torch.testing.assert_close(one, wanted[name], rtol=0.05, atol=0.05 * float(wanted[name].abs().max()))


def test_no_token_wanted_has_a_gradient_of_zero(tmp_path: Path):
    loaded = loaded_from(save(tmp_path, "llama"))
    inputs, at = batch()
    found = loaded.token_statistics(inputs, logprobs_and(temperature=1.0), torch.zeros_like(at))
    assert found.shape == (3, 6, 1)
    moved = gradients(loaded, found)
    assert moved
    assert all((one == 0).all() for one in moved.values())


class Largest(TorchDispatchMode):
    """The largest tensor made inside, in numbers; a model's weights, and views of them, are not made."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.there = {one.untyped_storage().data_ptr() for one in model.parameters()}
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self.there:
                self.numbers = max(self.numbers, one.numel())
        return found


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=2), LoraConfig(r=2, target_modules="lm_head")])
def test_a_pass_makes_no_logits_of_all_its_tokens(lora: LoraConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """24 tokens, two at a time: nothing is larger than two tokens' logits, or the layer's weights where they are trained."""
    vocabulary, width = 4000, 8
    config = tiny.config("llama")
    config.vocab_size, config.hidden_size, config.head_dim = vocabulary, width, 2
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path), device="cpu"), lora)
    monkeypatch.setitem(output_layer.NUMBERS_AT_ONCE, "cpu", 2 * vocabulary)
    ids = torch.randint(3, 28, (2, 12))
    inputs = PassInputs(ids[:, :3], torch.ones(2, 3).bool(), ids, torch.ones(2, 12).bool())
    actor_critic = ActorCritic(loaded, value="head")
    sampling = SamplingConfig(top_p=0.9, min_new_tokens=2)
    with Largest(actor_critic) as scoring, torch.no_grad():
        actor_critic(inputs, readings_of(sampling, (2,), loaded.generation), inputs.response_real)
    assert scoring.numbers == 2 * vocabulary
    with Largest(actor_critic) as update:
        found, values = actor_critic(inputs, logprobs_and(entropy_of, temperature=1.0), inputs.response_real)
        (found.sum() + values.sum()).backward()
    assert update.numbers <= max(2, width) * vocabulary < 24 * vocabulary


def test_the_value_head_gets_the_hidden_states_of_the_same_pass(tmp_path: Path):
    loaded = loaded_from(save(tmp_path, "llama"))
    inputs, at = batch()
    ran: list[int] = []
    loaded.model.model.register_forward_hook(lambda *_: ran.append(1))
    _, hidden = token_statistics(
        loaded.model,
        loaded.architecture,
        inputs,
        0,
        loaded.logit_rule,
        logprobs_and(temperature=1.0),
        at,
        with_hidden=True,
    )
    assert ran == [1]
    torch.testing.assert_close(loaded.model.lm_head(hidden), loaded.teacher_forced(inputs))
