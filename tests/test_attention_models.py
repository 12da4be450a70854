"""Captured attention equals eager ``output_attentions`` on every family, with padding on either side, with LoRA."""

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    T5Config,
)

from cagsr.attention import AttentionRegion, PromptAttentionReader

TOLERANCE = 1e-5
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-inverse-layer": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "gemma2": lambda: Gemma2Config(**GROUPED, attn_logit_softcapping=5.0, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral-window": lambda: MistralConfig(**GROUPED, sliding_window=6),
    "gpt_oss": lambda: GptOssConfig(
        **GROUPED,
        sliding_window=6,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=LLAMA_ROPE,
    ),
    "t5": lambda: T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    ),
    "bart": lambda: BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        decoder_start_token_id=2,
    ),
}
DECODERS = [name for name in CONFIGS if name not in ("t5", "bart")]
ENCODER_DECODERS = ["t5", "bart"]


def tiny_model(name, seed=0, changes=None, **options):
    """A random model of three layers (unless ``changes`` says otherwise) whose weights are scaled so that attention is sharp."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.update(changes or {})
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    model = auto.from_config(config, **options).eval()
    sharpen(model)
    return model


def sharpen(model, gain=2.0):
    t5 = model.config.model_type == "t5"
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("sinks"):
                parameter.normal_()
            elif path.endswith("q_norm.weight"):
                parameter.add_(2.0)  # normalised queries: only their gain can sharpen
            elif t5 and (path.endswith((".q.weight", "relative_attention_bias.weight"))):
                # T5 does not scale scores: its own initialisation is trained-like, only queries grow.
                parameter.mul_(2.0)
            elif not t5 and parameter.dim() >= 2:
                embedding = "emb" in path or "wte" in path or "wpe" in path or "shared" in path
                fan_in = parameter.shape[-2 if "c_" in path or "experts" in path else -1]
                parameter.normal_(std=1.0 if embedding else gain * fan_in**-0.5)


@dataclass
class Batch:
    """One forward over prompts and responses, and which part of its attention is asked for."""

    inputs: dict
    region: AttentionRegion
    prompt_mask: torch.Tensor
    response_mask: torch.Tensor


PROMPTS, RESPONSES = (7, 4, 9), (5, 8, 2)


def lengths_to_mask(lengths, left=False):
    steps = torch.arange(max(lengths))
    lengths = torch.tensor(lengths)[:, None]
    return steps >= max(lengths) - lengths if left else steps < lengths


def decoder_batch(model, side="left", prompts=PROMPTS, responses=RESPONSES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 64, (p + r,), generator=generator) for p, r in zip(prompts, responses, strict=True)]
    if side == "left":
        prompt_mask, response_mask = lengths_to_mask(prompts, left=True), lengths_to_mask(responses)
        mask = torch.cat([prompt_mask, response_mask], 1)
        region = AttentionRegion.left_padded(prompt_mask, response_mask)
    else:
        prompt_mask, response_mask = lengths_to_mask(prompts), lengths_to_mask(responses)
        mask = lengths_to_mask([p + r for p, r in zip(prompts, responses, strict=True)])
        region = AttentionRegion.right_padded(torch.tensor(prompts), torch.tensor(responses))
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.cat(tokens)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Batch(inputs, region, prompt_mask, response_mask)


def encoder_decoder_batch(side="right", prompts=PROMPTS, responses=RESPONSES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    prompt_mask, response_mask = lengths_to_mask(prompts, left=side == "left"), lengths_to_mask(responses)
    inputs = {
        "input_ids": torch.randint(3, 64, prompt_mask.shape, generator=generator).masked_fill(~prompt_mask, 0),
        "attention_mask": prompt_mask.long(),
        "decoder_input_ids": torch.randint(3, 64, response_mask.shape, generator=generator),
        "use_cache": False,
    }
    return Batch(inputs, AttentionRegion.encoder_decoder(prompt_mask, response_mask), prompt_mask, response_mask)


def batch_for(name, model, side):
    return encoder_decoder_batch(side) if name in ENCODER_DECODERS else decoder_batch(model, side)


def eager_attention(model, batch, layers=None, heads=None):
    """The reference, picked cell by cell: mean over layers and heads of what ``output_attentions`` returns."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        output = eager(**batch.inputs, output_attentions=True)
    maps = output.cross_attentions if eager.config.is_encoder_decoder else output.attentions
    maps = torch.stack(list(maps)).double()  # (layers, batch, heads, queries, keys)
    assert maps[..., -1, :].max() > 0.8, "the test needs sharp attention to say anything"
    maps = maps if layers is None else maps[list(layers)]
    maps = maps if heads is None else maps[:, :, list(heads)]
    mean = maps.mean((0, 2))
    region = batch.region
    expected = torch.zeros(region.shape, dtype=torch.float64)
    for i in range(region.shape[0]):
        for t, row in enumerate(region.rows[i].tolist()):
            for j, column in enumerate(region.columns[i].tolist()):
                if row >= 0 and column >= 0:
                    expected[i, t, j] = mean[region.batch[i], row, column]
    return expected


def captured_attention(model, batch, layers="all", heads="all"):
    reader = PromptAttentionReader(model, layers=layers, heads=heads)
    with torch.no_grad(), reader.read(batch.region) as reading:
        model(**batch.inputs)
    return reading.attention


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_capture_equals_eager_output_attentions(name, implementation, side):
    if implementation == "sdpa" and name in ("gemma2", "gpt_oss"):
        model = tiny_model(name)  # these refuse sdpa or choose eager by themselves
    else:
        model = tiny_model(name, attn_implementation=implementation)
    batch = batch_for(name, model, side)
    captured = captured_attention(model, batch)
    expected = eager_attention(model, batch)
    assert captured.dtype == torch.float32
    assert captured.shape == batch.region.shape
    torch.testing.assert_close(captured.double(), expected, rtol=0, atol=TOLERANCE)
    padding = ~(batch.region.rows >= 0)[:, :, None] | ~(batch.region.columns >= 0)[:, None, :]
    assert (captured[padding] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt_oss"])  # its experts are no linear layers
def test_capture_equals_eager_under_lora(name, side):
    peft = pytest.importorskip("peft")
    model = tiny_model(name)
    torch.manual_seed(3)
    kind = "SEQ_2_SEQ_LM" if name in ENCODER_DECODERS else "CAUSAL_LM"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type=kind)).eval()
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.2)
    batch = batch_for(name, model, side)
    reader = PromptAttentionReader(wrapped, layers="all")
    with torch.no_grad(), reader.read(batch.region) as adapted:
        wrapped(**batch.inputs)
    with torch.no_grad(), reader.read(batch.region) as plain, wrapped.disable_adapter():
        wrapped(**batch.inputs)
    torch.testing.assert_close(adapted.attention.double(), eager_attention(model, batch), rtol=0, atol=TOLERANCE)
    assert (adapted.attention - plain.attention).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_layers_and_heads_are_the_chosen_ones(name):
    model = tiny_model(name)
    batch = batch_for(name, model, "left")
    for layers, heads, expected in (
        ("last-1", "all", eager_attention(model, batch, layers=[2])),
        ("0,2", "all", eager_attention(model, batch, layers=[0, 2])),
        ([-2], "1,3", eager_attention(model, batch, layers=[1], heads=[1, 3])),
        ("last-9", [0], eager_attention(model, batch, heads=[0])),
        ("0,1", {0: [1], 1: [1]}, eager_attention(model, batch, layers=[0, 1], heads=[1])),
    ):
        captured = captured_attention(model, batch, layers, heads)
        torch.testing.assert_close(captured.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_without_padding_the_causal_fast_path_has_no_mask_at_all(name):
    model = tiny_model(name, attn_implementation="sdpa")
    batch = decoder_batch(model, prompts=(5, 5), responses=(4, 4))
    for attention_mask in (batch.inputs["attention_mask"], None):
        batch.inputs["attention_mask"] = attention_mask
        captured = captured_attention(model, batch)
        torch.testing.assert_close(captured.double(), eager_attention(model, batch), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_the_models_own_bit_for_bit(name):
    model = tiny_model(name)
    batch = batch_for(name, model, "left")
    reader = PromptAttentionReader(model)
    with torch.no_grad():
        before = model(**batch.inputs).logits
        with reader.read(batch.region):
            inside = model(**batch.inputs).logits
        after = model(**batch.inputs).logits
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
