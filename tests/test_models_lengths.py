"""Models that change with length: every token is scored, read and drawn as the model says of the tokens before it.

The truth is brute force, by transformers alone: one forward without a cache over exactly the tokens before each token.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    SwitchTransformersConfig,
)

import tiny
from cagsr.attention import PromptAttentionReader
from cagsr.config import LoraConfig, ModelConfig, SamplingConfig
from cagsr.diagnosis.signals import read_separately
from cagsr.errors import ModelError
from cagsr.flow import EpisodeBatch
from cagsr.models import decoder_only, sharing
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.inputs import PassInputs
from cagsr.models.lengths import length_borders
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.sharing import shares_prompts
from cagsr.rollout.sample import sample_responses
from cagsr.scoring.statistics import logprobs_and
from conversations import conversations, token_by_token
from scored import scored, scored_with_maps
from test_models_forward import made_up

BORDER = 16
SIZES: dict[str, Any] = {
    "vocab_size": 28,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [9.0, 3.0, 7.0, 5.0], "original_max_position_embeddings": BORDER}
CONFIGS: dict[str, PretrainedConfig] = {
    "phi3": Phi3Config(
        **SIZES,
        original_max_position_embeddings=BORDER,
        rope_scaling={"type": "longrope"} | LONGROPE,
        sliding_window=None,
    ),
    # Not Phi-3: transformers' own decoding keeps the short keys here.
    "llama-longrope": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0} | LONGROPE
    ),
    "llama-dynamic": LlamaConfig(
        **SIZES | {"max_position_embeddings": BORDER},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
    "mistral-window": MistralConfig(**SIZES, sliding_window=BORDER),
    "gemma3-window": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=BORDER, query_pre_attn_scalar=8),
    "llama4-chunks": Llama4TextConfig(
        **SIZES,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=BORDER,
        no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
        attn_temperature_tuning=True,
        floor_scale=40,
    ),
}
CHANGING = ["phi3", "llama-longrope"]
WHOLE = [kind for kind in CONFIGS if kind != "llama-dynamic"]
PROMPTS = {"below": [2, 4], "across": [9, 13], "at": [15, 16, 17], "above": [18, 23], "all": [4, 16, 23]}
CASES = [(kind, lengths) for kind in CHANGING for lengths in PROMPTS] + [
    (kind, "all") for kind in WHOLE if kind not in CHANGING
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, with attention sharp enough to tell frequencies apart."""
    found = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name and "norm" not in name:
                    parameter.mul_(4.0)
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(found[kind])
        tiny.tokenizer().save_pretrained(found[kind])
    return found


def loaded_from(folder: Path, **lora: Any) -> LoadedModel:
    return load_model(ModelConfig(str(folder), device="cpu"), LoraConfig(**lora))


def own(folder: Path, **options: Any) -> Any:
    """The model as transformers has it, untouched by us."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def answered(loaded: LoadedModel, prompts: list[int], longest: int = 12) -> EpisodeBatch:
    """Four answers of different lengths to prompts of these lengths."""
    group = [number for number in range(len(prompts)) for _ in range(4)]
    responses = [1 + (5 * place) % longest for place in range(len(group) - 1)] + [longest]
    return made_up(loaded, responses, prompts, group)


def each_by_itself(model: Any, rollout: EpisodeBatch) -> Tensor:
    """``(batch, response)`` log-probabilities, a forward without a cache for each token."""
    found = torch.zeros(rollout.ids.shape)
    for row in range(len(found)):
        prompt = rollout.prompts.ids[row][rollout.prompts.real[row]]
        answer = rollout.ids[row][rollout.sampled[row]]
        for token in range(len(answer)):
            before = torch.cat([prompt, answer[:token]])[None]
            with torch.no_grad():
                found[row, token] = (
                    model(input_ids=before, use_cache=False).logits[0, -1].log_softmax(-1)[answer[token]]
                )
    return found


def logprobs_of(loaded: LoadedModel, rollout: EpisodeBatch, micro_batch_size: int = 8) -> Tensor:
    return scored(loaded, rollout, micro_batch_size=micro_batch_size).logprobs


@pytest.mark.parametrize(("kind", "lengths"), CASES)
def test_a_token_is_scored_by_the_tokens_before_it(kind: str, lengths: str, folders: dict[str, Path]):
    loaded = loaded_from(folders[kind])
    rollout = answered(loaded, PROMPTS[lengths])
    truth = each_by_itself(own(folders[kind]), rollout)
    assert shares_prompts(loaded, rollout)
    torch.testing.assert_close(logprobs_of(loaded, rollout), truth, atol=2e-5, rtol=1e-5)
    sharing.stop_sharing(loaded.model)
    assert not shares_prompts(loaded, rollout)
    torch.testing.assert_close(logprobs_of(loaded, rollout), truth, atol=2e-5, rtol=1e-5)


@given(
    prompts=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    longest=st.integers(1, 14),
    micro_batch_size=st.integers(1, 12),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scores_depend_on_no_other_row(
    prompts: list[int], longest: int, micro_batch_size: int, folders: dict[str, Path]
):
    loaded = loaded_from(folders["phi3"])
    rollout = answered(loaded, prompts, longest)
    alone = logprobs_of(loaded, rollout, 1)
    torch.testing.assert_close(logprobs_of(loaded, rollout, micro_batch_size), alone, atol=2e-5, rtol=1e-5)
    sharing.stop_sharing(loaded.model)
    torch.testing.assert_close(logprobs_of(loaded, rollout, micro_batch_size), alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("value", "rank"), [("head", 0), ("head", 2), ("model", 0)])
def test_the_update_has_the_gradient_of_what_is_scored(value: str, rank: int, folders: dict[str, Path]):
    loaded = loaded_from(folders["phi3"], r=rank)
    actor_critic = ActorCritic(loaded, value)
    torch.nn.init.normal_(actor_critic.value_head.weight)
    rollout = answered(loaded, PROMPTS["all"])
    mask = rollout.sampled
    seen = []
    for share in (False, True):
        actor_critic.zero_grad()
        found, values = actor_critic(PassInputs.of(rollout, share=share), logprobs_and(temperature=1.0), mask)
        logprobs = found[..., 0]
        (logprobs[mask].sum() + values[mask].square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in actor_critic.parameters() if p.grad is not None])
        seen.append((logprobs[mask].detach(), values[mask].detach(), gradient))
    for plain, shared in zip(*seen, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-3, atol=2e-6 * float(plain.abs().max()))
    torch.testing.assert_close(seen[0][0], each_by_itself(own(folders["phi3"]), rollout)[mask], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "lengths"), CASES)
def test_greedy_answers_are_transformers_own(kind: str, lengths: str, folders: dict[str, Path]):
    """Phi-3's own decoding makes its cache anew at the border; where a model's does not, it is right without a cache."""
    loaded, model = loaded_from(folders[kind]), own(folders[kind])
    prompts = answered(loaded, PROMPTS[lengths]).prompts
    greedy = SamplingConfig(temperature=0, min_new_tokens=12, max_new_tokens=12)
    found = sample_responses(loaded, prompts, greedy)
    for row in range(0, len(found.ids), 4):
        ids = prompts.ids[row][prompts.real[row]][None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            use_cache=kind != "llama-longrope",
        )
        assert found.ids[row].tolist() == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("kind", "filters"),
    [(kind, {}) for kind in WHOLE]
    + [("phi3", {"top_p": 0.8, "temperature": 1.4}), ("phi3", {"top_k": 5, "min_new_tokens": 3})],
)
def test_answers_are_drawn_from_what_is_scored(kind: str, filters: dict[str, float], folders: dict[str, Path]):
    loaded = loaded_from(folders[kind])
    sampling = dataclasses.replace(SamplingConfig(max_new_tokens=14), **filters)
    torch.manual_seed(1)
    rollout = sample_responses(loaded, answered(loaded, PROMPTS["all"]).prompts, sampling)
    readings = scored(loaded, rollout, sampling, micro_batch_size=5)
    assert int((rollout.prompts.real.sum(1) + rollout.sampled.sum(1)).max()) > BORDER + 8
    torch.testing.assert_close(
        readings.logprobs - readings.sampling_correction, rollout.decoded_logprobs, atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", CHANGING)
def test_attention_across_the_border_is_eager_s(kind: str, share: bool, folders: dict[str, Path]):
    loaded, model = loaded_from(folders[kind]), own(folders[kind], attn_implementation="eager")
    rollout = answered(loaded, PROMPTS["all"])
    if not share:
        sharing.stop_sharing(loaded.model)
    _, found = scored_with_maps(loaded, rollout, micro_batch_size=5)
    expected = torch.zeros(found.shape)
    for row, column in rollout.sampled.nonzero().tolist():
        prompt = rollout.prompts.ids[row][rollout.prompts.real[row]]
        before = torch.cat([prompt, rollout.ids[row, :column]])[None]
        with torch.no_grad():
            maps = model(input_ids=before, output_attentions=True, use_cache=False).attentions
        expected[row, column, -len(prompt) :] = torch.stack(maps).mean(dim=(0, 2))[0, -1, : len(prompt)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    by_layer = read_separately(loaded, rollout, {n: PromptAttentionReader(loaded.model, [n]).read for n in (0, 1)})
    torch.testing.assert_close((by_layer[0] + by_layer[1]) / 2, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", CHANGING)
def test_two_turns_across_the_border_are_eager_s(kind: str, share: bool, folders: dict[str, Path]):
    """A row is fed once for each side of the border: what was replied on one side is seen from the other."""
    loaded, model = loaded_from(folders[kind]), own(folders[kind], attn_implementation="eager")
    segments = [(4, 3, 6), (2, 6, 5), (9, 2, 2), (3, 1, 1), (1, 1, 3)]
    episodes = conversations([5, 10, 17], [0, 1, 0, 1, 2], segments)
    if not share:
        sharing.stop_sharing(loaded.model)
    readings, found = scored_with_maps(loaded, episodes, micro_batch_size=5)
    logprobs, expected = token_by_token(model, episodes)
    torch.testing.assert_close(readings.logprobs, logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", CHANGING)
def test_a_row_padded_on_the_right_is_what_it_is_alone(kind: str, folders: dict[str, Path]):
    """As trainers batch: no positions are given, and the longest row is beyond the border."""
    loaded = loaded_from(folders[kind])
    ids = torch.randint(3, 28, (2, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(24) < torch.tensor([[10], [24]])
    with torch.no_grad():
        together = loaded.model(input_ids=ids, attention_mask=mask.long()).logits
        alone = own(folders[kind])(input_ids=ids[:1, :10]).logits
        long = own(folders[kind])(input_ids=ids[1:]).logits
    torch.testing.assert_close(together[:1, :10], alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:], long, atol=2e-5, rtol=1e-5)


def test_dynamic_frequencies_are_used_where_they_are_one_model_and_refused_beyond(folders: dict[str, Path]):
    loaded = loaded_from(folders["llama-dynamic"])
    assert length_borders(loaded.model) == ()
    rollout = answered(loaded, [2, 6], longest=BORDER - 6)
    truth = each_by_itself(own(folders["llama-dynamic"]), rollout)
    torch.testing.assert_close(logprobs_of(loaded, rollout), truth, atol=2e-5, rtol=1e-5)
    sampling = SamplingConfig(max_new_tokens=10, min_new_tokens=10)
    drawn = sample_responses(loaded, rollout.prompts, sampling)
    assert drawn.ids.shape[1] == 10
    with pytest.raises(ModelError, match=r"rope type dynamic .* max_position_embeddings of 16"):
        logprobs_of(loaded, answered(loaded, [8], longest=12))
    with pytest.raises(ModelError, match="17 tokens: with rope type dynamic"):
        sample_responses(loaded, rollout.prompts, dataclasses.replace(sampling, max_new_tokens=14, min_new_tokens=14))
    # The refusal leaves no longer frequencies behind.
    torch.testing.assert_close(logprobs_of(loaded, rollout), truth, atol=2e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="rope type dynamic"):
        loaded.model(input_ids=torch.ones(1, 17, dtype=torch.long))


def test_positions_that_count_padding_are_refused_where_they_matter(folders: dict[str, Path]):
    loaded = loaded_from(folders["llama4-chunks"])
    alike = answered(loaded, [30, 30], longest=14)
    truth = each_by_itself(own(folders["llama4-chunks"]), alike)
    torch.testing.assert_close(logprobs_of(loaded, alike), truth, atol=2e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"from 40 tokens on this llama4_text model .* count the padding"):
        logprobs_of(loaded, answered(loaded, [20, 30], longest=14))


def test_full_experts_are_refused(tmp_path: Path):
    config = SwitchTransformersConfig(
        vocab_size=28,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=8,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = loaded_from(tmp_path)
    assert bool((logprobs_of(loaded, answered(loaded, [9], longest=8)).sum(dim=1) < 0).all())
    with pytest.raises(ModelError, match=r"Answers of 9 tokens: .* expert_capacity 8"):
        logprobs_of(loaded, answered(loaded, [9], longest=9))


def test_the_probe_asks_at_the_lengths_of_the_batch(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """A cache that forgets beyond some length is found out by the first batch that reaches it, and by no shorter one."""
    loaded = loaded_from(folders["mistral-window"])
    genuine = decoder_only.DecoderOnly.hidden

    def forgetful(self: Any, seen: Any, fed: PassInputs) -> Tensor:
        hidden = genuine(self, seen, fed)
        forgets = fed.shared is not None and fed.prompt_ids.shape[1] + fed.response_ids.shape[1] >= 20
        return hidden * 1.01 if forgets else hidden

    monkeypatch.setattr(decoder_only.DecoderOnly, "hidden", forgetful)
    asked: list[int] = []
    agrees = sharing._agrees
    monkeypatch.setattr(sharing, "_agrees", lambda *args: asked.append(1) or agrees(*args))
    short, longer, long = (answered(loaded, [5], longest=n) for n in (6, 9, 16))
    assert shares_prompts(loaded, longer)
    assert len(asked) == 2  # the tiny batch, and this one
    assert shares_prompts(loaded, short)
    assert len(asked) == 2
    assert not shares_prompts(loaded, long)
    assert not shares_prompts(loaded, short)
    assert len(asked) == 3
