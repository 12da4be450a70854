"""The kernel's own log-sum-exp: used where it can be, the same numbers as without, the model's output untouched."""

import pytest
import torch
import torch.nn.functional as F

from cagsr.attention import AttentionRegion, PromptAttentionReader, intercept, rows
from cagsr.attention.intercept import listening
from cagsr.attention.logsumexp import LogSumExpRecorder
from cagsr.attention.plan import plan_region
from test_attention_models import batch_for, captured_attention, decoder_batch, eager_attention, tiny_model


def calls_of(model, batch, **options):
    heard = []
    modules = [layer.self_attn for layer in model.model.layers]
    with torch.no_grad(), listening(modules, lambda _, call: heard.append(call), **options):
        model(**batch.inputs)
    return heard


@pytest.mark.parametrize("mask", [None, "causal", "additive"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_output_is_sdpas_bit_for_bit_and_keeps_its_gradient(grouped, mask):
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 9, 8) for heads in (4, *((2, 2) if grouped else (4, 4)))]
    seen = torch.ones(9, 9).tril().bool()
    options = {
        None: {},
        "causal": {"is_causal": True},
        "additive": {"attn_mask": torch.randn(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)},
    }[mask]

    def run(recorder=None):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        if recorder is None:
            output = F.scaled_dot_product_attention(*leaves, enable_gqa=grouped, **options)
        else:
            with recorder:
                output = F.scaled_dot_product_attention(*leaves, enable_gqa=grouped, **options)
        output.square().sum().backward()
        return output, [leaf.grad for leaf in leaves]

    recorder = LogSumExpRecorder()
    output, gradients = run(recorder)
    expected, expected_gradients = run()
    assert torch.equal(output, expected)
    assert all(map(torch.equal, gradients, expected_gradients))
    scores = inputs[0].double() @ inputs[1].double().repeat_interleave(2 if grouped else 1, 1).transpose(2, 3) * 8**-0.5
    scores = scores + options["attn_mask"] if mask == "additive" else scores
    scores = scores.masked_fill(~seen, -torch.inf) if mask == "causal" else scores
    found = recorder.found(inputs[0])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_less_precise_or_other_queries_give_none():
    query = torch.randn(1, 2, 4, 8)
    with LogSumExpRecorder() as recorder:
        F.scaled_dot_product_attention(query, query, query)
    assert recorder.found(query) is not None
    assert recorder.found(query.double()) is None
    assert recorder.found(query[:, :, :3]) is None
    low = query.bfloat16()
    with LogSumExpRecorder() as recorder:
        F.scaled_dot_product_attention(low, low, low)
    assert recorder.found(low) is None
    with LogSumExpRecorder() as recorder:
        for _ in range(2):
            F.scaled_dot_product_attention(query, query, query)
    assert recorder.found(query) is None
    assert LogSumExpRecorder().found(query) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "mistral-window", "bart"])
def test_only_the_columns_are_computed_under_sdpa(name, side, monkeypatch):
    model = tiny_model(name, attn_implementation="sdpa")
    batch = batch_for(name, model, side)

    def all_keys(*_):
        raise AssertionError("all keys were computed, although the log-sum-exp is known")

    monkeypatch.setattr(rows, "softmax_columns", all_keys)
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", 40)
    monkeypatch.setattr(rows, "_NARROWEST", 2)
    captured = captured_attention(model, batch)
    torch.testing.assert_close(captured.double(), eager_attention(model, batch), rtol=0, atol=1e-5)


def test_only_readings_without_gradients_ask_for_it():
    model = tiny_model("llama", attn_implementation="sdpa")
    batch = decoder_batch(model)
    assert all(call.logsumexp is None for call in calls_of(model, batch))
    assert all(call.logsumexp.shape == call.query.shape[:3] for call in calls_of(model, batch, logsumexp=True))
    eager = tiny_model("llama", attn_implementation="eager")
    assert all(call.logsumexp is None for call in calls_of(eager, batch, logsumexp=True))
    with PromptAttentionReader(model).read(batch.region, with_gradients=True):
        assert not any(logsumexp for entries in intercept._listeners.values() for _, logsumexp in entries)


@pytest.mark.parametrize(("name", "is_open"), [("llama", True), ("mistral-window", False)])
@pytest.mark.parametrize("padded", [False, True])
def test_columns_that_every_row_sees_need_no_mask(name, is_open, padded):
    model = tiny_model(name, attn_implementation="sdpa")
    batch = decoder_batch(model, prompts=(7, 4 if padded else 7), responses=(5, 5))
    call = calls_of(model, batch, logsumexp=True)[0]
    (piece,) = plan_region(batch.region, call, causal=True)
    assert piece.open == is_open
    # A column beyond the first row is not seen by it, whatever the mask.
    ahead = AttentionRegion(batch.region.batch, batch.region.rows, batch.region.columns + 1)
    assert not plan_region(ahead, call, causal=True)[0].open


@pytest.mark.parametrize("heads", ["all", [0, 3]])
def test_a_fused_kernel_is_handed_what_it_needs(heads, monkeypatch):
    model = tiny_model("llama", attn_implementation="sdpa")
    batch = decoder_batch(model)
    expected = captured_attention(model, batch, heads=heads)
    calls = []

    def kernel(target, query, key, key_heads, logsumexp, scaling):
        calls.append(query.shape)
        scores = query @ key[:, key_heads.long()].transpose(2, 3) * scaling
        target += (scores - logsumexp[..., None]).exp().sum(1)

    monkeypatch.setattr(rows, "_kernel", lambda device: kernel)
    torch.testing.assert_close(captured_attention(model, batch, heads=heads), expected, rtol=0, atol=1e-6)
    assert len(calls) == 3
    # A window needs a mask, which the kernel does not take.
    window = tiny_model("mistral-window", attn_implementation="sdpa")
    captured = captured_attention(window, batch_for("mistral-window", window, "left"))
    assert len(calls) == 3
    assert captured.sum() > 0
