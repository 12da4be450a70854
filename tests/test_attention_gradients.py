"""Gradients through the captured attention equal those through eager attention, checkpointed or not."""

import copy

import pytest
import torch

from cagsr.attention import AttentionRegion, PromptAttentionReader, rows
from cagsr.errors import AttentionError
from test_attention_models import batch_for, decoder_batch, tiny_model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights_for(region):
    torch.manual_seed(5)
    return torch.randn(region.shape)


def logits_loss(output, batch):
    # Padding rows see nothing and differ between sdpa and eager.
    real = batch.response_mask if "decoder_input_ids" in batch.inputs else batch.inputs["attention_mask"]
    return (output.logits.square() * real[..., None]).mean()


def eager_gradients(model, batch, weights):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(**batch.inputs, output_attentions=True)
    maps = output.cross_attentions if eager.config.is_encoder_decoder else output.attentions
    mean = torch.stack(list(maps)).mean((0, 2))
    region = batch.region
    index = torch.arange(region.shape[0])[:, None, None]
    read = mean[index, region.rows.clamp(min=0)[:, :, None], region.columns.clamp(min=0)[:, None, :]]
    loss = (read * weights * region.valid(read.device)).sum() + logits_loss(output, batch)
    loss.backward()
    return gradients(eager)


def captured_gradients(model, batch, weights, backward_inside):
    reader = PromptAttentionReader(model, layers="all")
    with reader.read(batch.region, with_gradients=True) as reading:
        output = model(**batch.inputs)
        loss = (reading.attention * weights).sum() + logits_loss(output, batch)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return gradients(model)


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral-window", "t5", "bart"])
def test_gradients_equal_eager(name, checkpointing, backward_inside, monkeypatch):
    # Blocks of a few scores: heads, sequences and rows are all divided.
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", 60)
    model = tiny_model(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    batch = batch_for(name, model, "left" if name != "mistral-window" else "right")
    weights = weights_for(batch.region)
    expected = eager_gradients(model, batch, weights)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(captured_gradients(model, batch, weights, backward_inside), expected)


def test_attention_alone_reaches_queries_and_keys():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    reader = PromptAttentionReader(model, layers="last-1")
    with reader.read(batch.region, with_gradients=True) as reading:
        model(**batch.inputs)
    reading.attention.sum().backward()
    last = model.model.layers[-1].self_attn
    assert last.q_proj.weight.grad.abs().max() > 0
    assert last.k_proj.weight.grad.abs().max() > 0
    assert last.v_proj.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_rerun_in_backward_is_not_a_second_forward(use_reentrant):
    model = tiny_model("llama").train()
    batch = decoder_batch(model)
    reader = PromptAttentionReader(model, layers="all")
    with torch.no_grad(), reader.read(batch.region) as plain:
        model(**batch.inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with reader.read(batch.region) as reading:
        loss = model(**batch.inputs).logits.square().mean()
        before = reading.attention.clone()
        loss.backward()
    assert torch.equal(reading.attention, before)
    assert torch.equal(reading.attention, plain.attention)
    assert not reading.attention.requires_grad


def test_reentrant_checkpointing_with_gradients_is_refused():
    model = tiny_model("llama").train()
    batch = decoder_batch(model)
    reader = PromptAttentionReader(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(AttentionError, match="use_reentrant"), reader.read(batch.region, with_gradients=True):
        model(**batch.inputs)


def test_gradients_through_packed_sequences():
    model = tiny_model("llama")
    batch = decoder_batch(model, "right", prompts=(4, 3), responses=(3, 5))
    weights = weights_for(batch.region)
    lone = captured_gradients(model, batch, weights, backward_inside=False)
    model.zero_grad()
    mask = batch.inputs["attention_mask"].bool()
    ids = batch.inputs["input_ids"][mask][None]
    position_ids = batch.inputs["position_ids"][mask][None]
    region = AttentionRegion.packed(torch.tensor([4, 3]), torch.tensor([3, 5]))
    reader = PromptAttentionReader(model, layers="all")
    with reader.read(region, with_gradients=True) as reading:
        model(input_ids=ids, position_ids=position_ids, use_cache=False)
    (reading.attention * weights).sum().backward()
    packed = gradients(model)
    model.zero_grad()
    with reader.read(batch.region, with_gradients=True) as reading:
        model(**batch.inputs)
    (reading.attention * weights).sum().backward()
    assert_same_gradients(packed, gradients(model))
    assert lone.keys() >= packed.keys()
