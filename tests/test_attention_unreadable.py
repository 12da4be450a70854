"""Models whose attention can't be read are named, with their layers; nothing is read silently wrong."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    JambaConfig,
    MambaConfig,
    OpenAIGPTConfig,
)

from cagsr.attention import PromptAttentionReader
from cagsr.errors import AttentionError
from test_attention_models import SMALL, captured_attention, decoder_batch, eager_attention, sharpen, tiny_model

UNREADABLE = {
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "gptj": GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4),
    "falcon": FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "openai-gpt": OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_model_type_and_its_layers_are_named(name):
    model = AutoModelForCausalLM.from_config(UNREADABLE[name])
    with pytest.raises(AttentionError, match=rf"{name} model .*none of its 2 layers") as caught:
        PromptAttentionReader(model)
    assert "\n" not in str(caught.value)


def test_gpt2_that_computes_its_own_attention():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, reorder_and_upcast_attn=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(AttentionError, match="gpt2 model"):
        PromptAttentionReader(model)


def test_a_module_that_calls_the_interface_twice():
    config = DiffLlamaConfig(**SMALL, num_key_value_heads=2)
    with pytest.raises(AttentionError, match=r"diffllama model .*layer 0 calls the attention interface 2 times"):
        PromptAttentionReader(AutoModelForCausalLM.from_config(config))


def test_a_hybrid_model_is_read_where_it_has_attention():
    config = JambaConfig(
        **{**SMALL, "num_hidden_layers": 4},
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert PromptAttentionReader(model).layers == (1, 3)
    assert PromptAttentionReader(model, "last-1").layers == (3,)
    with pytest.raises(AttentionError, match="layers 0, 2 of a jamba model"):
        PromptAttentionReader(model, layers="0,1,2")
    sharpen(model)
    batch = decoder_batch(model, prompts=(6, 6), responses=(4, 4))
    torch.testing.assert_close(
        captured_attention(model, batch).double(), eager_attention(model, batch), rtol=0, atol=1e-5
    )


def test_virtual_prompt_tokens_would_shift_the_columns():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(AttentionError, match="virtual tokens"):
        PromptAttentionReader(model)


def test_a_forward_that_fails_is_told_with_its_reason():
    model = tiny_model("llama")

    def fail(*_):
        raise ValueError("broken weights")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(AttentionError, match=r"llama model .*broken weights"):
        PromptAttentionReader(model)
