"""A tiny Llama and a tokenizer written as llama.cpp's converter writes them: a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

import tiny

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What a layer's parts are called in transformers and in GGUF."""
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tokenizer() -> Tokenizer:
    """Bytes, and the words of the tiny models."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(tiny.WORDS)] * 4, trainer)
    return core


def model(words: int, *, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: Any = tiny.config("llama")
    settings.vocab_size, settings.tie_word_embeddings = words, False
    # Blocks of 32 numbers, which Q8_0 packs, must fit into a row.
    settings.intermediate_size = 64
    made = LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return made


def write(path: Path, kind: str = "F32", *, seed: int = 0, pad: bool = True) -> LlamaForCausalLM:
    """Write matrices as ``kind`` (F32, F16, Q8_0), the rest as F32; gives the model with the numbers that the file holds."""
    import gguf

    core = tokenizer()
    source = model(core.get_vocab_size(), seed=seed)
    settings = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type({"F32": 0, "F16": 1, "Q8_0": 7}[kind])
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_rope_dimension_count(settings.hidden_size // settings.num_attention_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_vocab_size(settings.vocab_size)
    words = sorted(core.get_vocab(), key=core.get_vocab().get)  # type: ignore[arg-type]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tiny.SPECIAL else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in _merges(core)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if pad:
        writer.add_pad_token_id(0)
    wanted = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, tensor in source.named_parameters():
            stored = tensor.detach().numpy()
            if tensor.dim() == 2:
                permuted = "q_proj" in name or "k_proj" in name
                heads = settings.num_attention_heads if "q_proj" in name else settings.num_key_value_heads
                packed = gguf.quantize(_by_pairs(stored, heads) if permuted else stored, wanted)
                found = torch.from_numpy(np.array(gguf.dequantize(packed, wanted)))
                tensor.copy_(_by_halves(found, heads) if permuted else found)
            else:
                packed = stored
            writer.add_tensor(_name(name), packed, raw_dtype=wanted if tensor.dim() == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def _merges(core: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]


def _name(name: str) -> str:
    module, _, ending = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{ending}"
    number, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[part]}.{ending}"


def _by_pairs(rows: Any, heads: int) -> Any:
    """llama.cpp rotates numbers that stand side by side, transformers those of two halves."""
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


def _by_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.reshape(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
