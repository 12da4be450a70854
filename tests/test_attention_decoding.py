"""Attention read step by step with a key-value cache, and from packed batches, equals that of one teacher-forced pass."""

import pytest
import torch
from transformers import DynamicCache

from cagsr.attention import AttentionRegion, PromptAttentionReader
from test_attention_models import DECODERS, captured_attention, decoder_batch, encoder_decoder_batch, tiny_model


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_equals_one_pass(name):
    model = tiny_model(name)
    batch = decoder_batch(model, prompts=(7, 4, 9), responses=(6, 6, 6))
    expected = captured_attention(model, batch)
    width = batch.prompt_mask.shape[1]
    positions = batch.inputs["attention_mask"].cumsum(1) - 1
    reader = PromptAttentionReader(model, layers="all")
    cache = DynamicCache(config=model.config)
    steps = []
    for step in range(6):
        span = slice(0, width) if step == 0 else slice(width + step - 1, width + step)
        if step == 0:
            region = AttentionRegion.left_padded(batch.prompt_mask, torch.ones(3, 1))
        else:
            region = AttentionRegion.decoding(batch.prompt_mask, fed=step)
        with torch.no_grad(), reader.read(region) as reading:
            model(
                input_ids=batch.inputs["input_ids"][:, span],
                attention_mask=batch.inputs["attention_mask"][:, : span.stop],
                position_ids=positions.clamp(min=0)[:, span],
                past_key_values=cache,
                use_cache=True,
            )
        steps.append(reading.attention)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_attention_inside_generate_equals_one_pass(name):
    model = tiny_model(name)
    batch = decoder_batch(model, prompts=(7, 4), responses=(5, 5))
    width = batch.prompt_mask.shape[1]
    reader = PromptAttentionReader(model, layers="all")
    steps = []
    forward = model.forward

    def reading_forward(*args, **kwargs):
        fed = kwargs["attention_mask"].shape[1] - width
        region = (
            AttentionRegion.left_padded(batch.prompt_mask, torch.ones(2, 1))
            if fed == 0
            else AttentionRegion.decoding(batch.prompt_mask, fed=fed)
        )
        with reader.read(region) as reading:
            output = forward(*args, **kwargs)
        steps.append(reading.attention)
        return output

    model.forward = reading_forward
    ids = model.generate(
        batch.inputs["input_ids"][:, :width],
        attention_mask=batch.inputs["attention_mask"][:, :width],
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    del model.forward
    batch.inputs["input_ids"] = ids
    torch.testing.assert_close(torch.cat(steps, 1), captured_attention(model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder_steps_equal_one_pass(name):
    model = tiny_model(name)
    batch = encoder_decoder_batch(responses=(5, 5, 5))
    expected = captured_attention(model, batch)
    reader = PromptAttentionReader(model, layers="all")
    region = AttentionRegion.encoder_decoder(batch.prompt_mask, torch.ones(3, 1))
    cache, steps = None, []
    for step in range(5):
        with torch.no_grad(), reader.read(region) as reading:
            output = model(
                input_ids=batch.inputs["input_ids"],
                attention_mask=batch.inputs["attention_mask"],
                decoder_input_ids=batch.inputs["decoder_input_ids"][:, step : step + 1],
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        steps.append(reading.attention)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt_oss"])
def test_several_response_tokens_after_a_cached_prompt(name):
    model = tiny_model(name)
    batch = decoder_batch(model, prompts=(7, 4, 9), responses=(4, 4, 4))
    width = batch.prompt_mask.shape[1]
    positions = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    reader = PromptAttentionReader(model, layers="all")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        first, second = slice(0, width), slice(width, width + 4)
        model(
            input_ids=ids[:, first],
            attention_mask=mask[:, first],
            position_ids=positions[:, first],
            past_key_values=cache,
        )
        region = AttentionRegion(
            batch=torch.arange(3),
            rows=torch.arange(3).expand(3, 3),
            columns=torch.arange(width).expand(3, width).masked_fill(~batch.prompt_mask, -1),
            keys=width + 4,
        )
        with reader.read(region) as reading:
            model(
                input_ids=ids[:, second], attention_mask=mask, position_ids=positions[:, second], past_key_values=cache
            )
    torch.testing.assert_close(reading.attention, captured_attention(model, batch)[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gemma3"])
def test_packed_equals_unpacked(name, implementation):
    prompts, responses = (7, 4, 9, 3), (5, 8, 2, 4)
    model = tiny_model(name, attn_implementation=implementation)
    batch = decoder_batch(model, "right", prompts, responses)
    expected = captured_attention(model, batch)
    mask = batch.inputs["attention_mask"].bool()
    flat_ids, flat_positions = batch.inputs["input_ids"][mask], batch.inputs["position_ids"][mask]
    reader = PromptAttentionReader(model, layers="all")

    region = AttentionRegion.packed(torch.tensor(prompts), torch.tensor(responses))
    with torch.no_grad(), reader.read(region) as reading:
        model(input_ids=flat_ids[None], position_ids=flat_positions[None], use_cache=False)
    torch.testing.assert_close(reading.attention, expected, rtol=0, atol=1e-5)

    # Two batch rows: sequences 0 and 1 (24 tokens), 2 and 3 (18 tokens and a padding sequence of 6).
    ids, positions = torch.zeros(2, 24, dtype=torch.int64), torch.zeros(2, 24, dtype=torch.int64)
    ids[0], positions[0] = flat_ids[:24], flat_positions[:24]
    ids[1, :18], positions[1, :18], positions[1, 18:] = flat_ids[24:], flat_positions[24:], torch.arange(6)
    region = AttentionRegion.packed(torch.tensor(prompts), torch.tensor(responses), batch=torch.tensor([0, 0, 1, 1]))
    with torch.no_grad(), reader.read(region) as reading:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(reading.attention, expected, rtol=0, atol=1e-5)
