"""The life of a reading: what it holds, what it refuses, and that the model is exactly as before."""

import copy
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import apart
from cagsr.attention import AttentionRegion, PromptAttentionReader, intercept
from cagsr.errors import AttentionError, ConfigError
from test_attention_models import CONFIGS, captured_attention, decoder_batch, eager_attention, tiny_model


class Broken(Exception):
    pass


def surroundings(model):
    """All that a reading could leave changed."""
    return (
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        modeling_llama.eager_attention_forward,
        model.config.to_dict(),
        model.config._attn_implementation,
        {name: (type(module), dict(module._forward_hooks)) for name, module in model.named_modules()},
        ["forward" in vars(module) for module in model.modules()],
        [module.training for module in model.modules()],
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_exception_inside_leaves_everything_as_before(implementation):
    model = tiny_model("llama", attn_implementation=implementation)
    batch = decoder_batch(model)
    before = surroundings(model)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    reader = PromptAttentionReader(model)
    assert surroundings(model) == before

    reading = reader.read(batch.region)

    def forward_and_fail():
        with torch.no_grad(), reading:
            assert surroundings(model)[:3] != before[:3]
            model(**batch.inputs)
            raise Broken

    with pytest.raises(Broken):
        forward_and_fail()
    assert surroundings(model) == before
    assert not intercept._wrapped
    assert not intercept._listeners
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, logits)
    assert reading.attention.isfinite().all()


def test_an_exception_inside_the_forward_is_the_callers_and_the_next_reading_works():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    before = surroundings(model)
    reader = PromptAttentionReader(model, layers="all")

    def fail(*_):
        raise Broken

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(Broken), torch.no_grad(), reader.read(batch.region) as reading:
        model(**batch.inputs)
    hook.remove()
    assert surroundings(model) == before
    with pytest.raises(AttentionError, match="layers 1, 2 never reported"):
        _ = reading.attention
    assert torch.equal(captured_attention(model, batch), captured_attention(copy.deepcopy(model), batch))


def test_readings_in_turn_and_nested_of_policy_and_reference():
    policy, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    batch = decoder_batch(policy)
    expected = captured_attention(policy, batch), captured_attention(reference, batch)
    readers = PromptAttentionReader(policy, "all"), PromptAttentionReader(reference, "all")
    with torch.no_grad():
        for _ in range(2):
            with readers[0].read(batch.region) as outer:
                policy(**batch.inputs)
                with readers[1].read(batch.region) as inner:
                    reference(**batch.inputs)
            assert torch.equal(outer.attention, expected[0])
            assert torch.equal(inner.attention, expected[1])
        # The other way round: the inner reading is over before the outer forward runs.
        with readers[0].read(batch.region) as outer:
            with readers[1].read(batch.region) as inner:
                reference(**batch.inputs)
            policy(**batch.inputs)
    assert torch.equal(outer.attention, expected[0])
    assert torch.equal(inner.attention, expected[1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_that_nobody_reads_pass_straight_through(implementation):
    model = tiny_model("llama", attn_implementation=implementation)
    other = tiny_model("llama", seed=2, attn_implementation=implementation)
    batch = decoder_batch(model)
    reader = PromptAttentionReader(model)
    with torch.no_grad():
        expected = other(**batch.inputs).logits
        with reader.read(batch.region) as reading:
            assert torch.equal(other(**batch.inputs).logits, expected)
    with pytest.raises(AttentionError, match="before a forward"):
        _ = reading.attention


def test_threads_read_their_own_models():
    models = [tiny_model("llama", seed=seed) for seed in range(3)]
    batch = decoder_batch(models[0])
    expected = [captured_attention(model, batch) for model in models]
    results = [None] * 3

    def work(i):
        reader = PromptAttentionReader(models[i], "all")
        for _ in range(10):
            with torch.no_grad(), reader.read(batch.region) as reading:
                models[i](**batch.inputs)
            results[i] = reading.attention

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    assert not intercept._wrapped


def test_attention_before_a_forward_is_refused():
    model = tiny_model("llama")
    with (
        PromptAttentionReader(model).read(decoder_batch(model).region) as reading,
        pytest.raises(AttentionError, match="before a forward"),
    ):
        _ = reading.attention


def test_a_second_forward_inside_one_reading_is_refused():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    with torch.no_grad(), PromptAttentionReader(model).read(batch.region) as reading:
        model(**batch.inputs)
        first = reading.attention.clone()
        with pytest.raises(AttentionError, match="second forward"):
            model(**batch.inputs)
    assert torch.equal(reading.attention, first)
    with pytest.raises(AttentionError, match="one with block"):
        reading.__enter__()


@pytest.mark.parametrize("layers", [2, 8])
def test_one_buffer_whatever_the_number_of_layers_and_heads(layers):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = decoder_batch(model, prompts=(20, 20), responses=(20, 20))
    reader = PromptAttentionReader(model, "all")
    held = []
    with torch.no_grad(), reader.read(batch.region) as reading:

        def measure(module, call):
            if reading._sum is not None:
                held.append((reading._sum.numel(), len(reading._plans)))

        with intercept.listening([layer.self_attn for layer in model.model.layers], measure):
            model(**batch.inputs)
    assert len(held) == layers - 1  # the last layer's report finishes the reading
    assert len(set(held)) == 1
    assert held[0][0] == 2 * 20 * 20
    assert held[0][1] == 1, "the mask's rows are worked out once, not once a layer"


def test_bfloat16_accumulates_in_float32():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    low = copy.deepcopy(model).to(torch.bfloat16)
    heard = []
    reader = PromptAttentionReader(low, "all")
    with torch.no_grad(), reader.read(batch.region) as reading:
        listen = intercept.listening(
            [layer.self_attn for layer in low.model.layers], lambda _, call: heard.append((call.query, call.key))
        )
        with listen:
            low(**batch.inputs)
    assert reading.attention.dtype == torch.float32
    # The model's own bfloat16 queries and keys, taken up to float64 by hand.
    expected = 0
    real = batch.inputs["attention_mask"].bool()
    size = real.shape[1]
    seen = real[:, None, None, :] & torch.ones(size, size).tril().bool()
    for query, key in heard:
        scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
        expected = expected + scores.masked_fill(~seen, -1e30).softmax(-1).mean(1) / len(heard)
    width = batch.prompt_mask.shape[1]
    expected = expected[:, width - 1 : -1, :width] * batch.region.valid(expected.device)
    torch.testing.assert_close(reading.attention.double(), expected, rtol=0, atol=1e-6)


def test_autocast_does_not_touch_the_captured_numbers():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    heard = []
    reader = PromptAttentionReader(model, "last-1")
    attention = model.model.layers[-1].self_attn
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        reader.read(batch.region) as reading,
        intercept.listening([attention], lambda _, call: heard.append(call)),
    ):
        model(**batch.inputs)
    call = heard[0]
    scores = call.query.double() @ call.key.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    probabilities = scores.masked_fill(~call.mask, -1e30).softmax(-1).mean(1)
    width = batch.prompt_mask.shape[1]
    expected = probabilities[:, width - 1 : -1, :width] * batch.region.valid(scores.device)
    torch.testing.assert_close(reading.attention.double(), expected, rtol=0, atol=1e-6)


def test_what_is_read_under_inference_mode_can_be_trained_with():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    with torch.inference_mode(), PromptAttentionReader(model, "all").read(batch.region) as reading:
        model(**batch.inputs)
    weight = torch.ones((), requires_grad=True)
    (reading.attention * weight).sum().backward()
    torch.testing.assert_close(reading.attention.double(), eager_attention(model, batch), rtol=0, atol=1e-5)


def test_the_probe_leaves_training_flags_and_random_numbers_alone():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    PromptAttentionReader(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_distributed_data_parallel():
    apart.together(1, reads_through_ddp)


def reads_through_ddp():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    expected = captured_attention(model, batch)
    torch.distributed.init_process_group("gloo")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    reader = PromptAttentionReader(wrapped, "all")
    with reader.read(batch.region) as reading:
        wrapped(**batch.inputs).logits.sum().backward()
    assert torch.equal(reading.attention, expected)
    torch.distributed.destroy_process_group()


def test_a_module_around_the_model_is_seen_through():
    class WithValueHead(torch.nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.value, self.policy = torch.nn.Linear(32, 1), policy

    model = tiny_model("llama")
    reader = PromptAttentionReader(WithValueHead(model))
    assert reader.layers == (0, 1, 2)
    assert not reader.cross
    assert reader.model_type == "llama"
    with pytest.raises(AttentionError, match="Linear holds no transformers model"):
        PromptAttentionReader(torch.nn.Linear(2, 2))


def test_a_region_of_another_forward_is_refused():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    reader = PromptAttentionReader(model)
    for region, said in (
        (AttentionRegion.left_padded(torch.ones(3, 30), torch.ones(3, 2)), "query position 30"),
        (AttentionRegion.left_padded(torch.ones(5, 9), torch.ones(5, 2)), "batch row 4"),
        (AttentionRegion.encoder_decoder(torch.ones(3, 30), torch.ones(3, 2)), "key position 29"),
    ):
        with pytest.raises(AttentionError, match=said), torch.no_grad(), reader.read(region):
            model(**batch.inputs)


def test_responses_of_no_tokens_give_empty_or_zero_attention():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    batch.region.rows[1] = -1
    assert (captured_attention(model, batch)[1] == 0).all()
    ids = batch.inputs["input_ids"][:, :9]
    region = AttentionRegion.left_padded(batch.prompt_mask, torch.ones(3, 0))
    with torch.no_grad(), PromptAttentionReader(model).read(region) as reading:
        model(input_ids=ids, attention_mask=batch.inputs["attention_mask"][:, :9])
    assert reading.attention.shape == (3, 0, 9)


def test_bad_choices_are_config_errors():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="layer 3"):
        PromptAttentionReader(model, layers="0,3")
    with pytest.raises(ConfigError, match="head 4"):
        PromptAttentionReader(model, heads="4")
