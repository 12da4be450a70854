"""Tiny real models and a tokenizer, made from a config with random weights and saved in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MBartConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "sees",
    "likes",
    "near",
    "red",
    "blue",
    "green",
    "small",
    "big",
    "and",
    ".",
    ",",
    "name",
    "food",
    "area",
    "tell",
    "me",
    "about",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def tokenizer(*, pad: str | None = "<pad>", bos: bool = True) -> PreTrainedTokenizerFast:
    """A word tokenizer; ``pad`` may be None or "<eos>" for the two bad cases."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def config(kind: str) -> PretrainedConfig:
    """A two-layer config of each family."""
    size = len(SPECIAL) + len(WORDS)
    common: dict[str, Any] = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    decoder = common | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    head = {"head_dim": 8}
    bart = common | {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    made: dict[str, PretrainedConfig] = {
        "llama": LlamaConfig(**decoder),
        "qwen3": Qwen3Config(**decoder, **head),
        "mistral": MistralConfig(**decoder, sliding_window=6),
        "gemma3": Gemma3TextConfig(**decoder, **head, sliding_window=8, query_pre_attn_scalar=8),
        "lfm2": Lfm2Config(**decoder, layer_types=["conv", "full_attention"]),
        "gpt2": GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "gpt_neox": GPTNeoXConfig(
            **common,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        "t5": T5Config(**common, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        "bart": BartConfig(**bart),
        "mbart": MBartConfig(**bart),
    }
    return made[kind]


def save_model(folder: Path, kind: str = "llama", *, seed: int = 0, scale: float = 4.0, **tokens: Any) -> Path:
    """Save a random model with sharp-ish attention and its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    settings = config(kind)
    auto = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "norm" not in name:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    tokenizer(**tokens).save_pretrained(folder)
    return folder


def save_prompts(path: Path, count: int = 12) -> Path:
    """Save different short prompts as JSONL."""
    colours, animals = ("red", "blue", "green"), ("cat", "dog", "bird", "tree")
    texts = [f"tell me about the {colours[i % 3]} {animals[i % 4]} near a house" for i in range(12)]
    rows = [{"prompt": texts[i % 12] + " ." * (i // 12)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
