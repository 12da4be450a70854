"""A tiny model with random weights, its tokenizer and a few prompts: the examples need no network and no download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [
    *("the", "a", "cat", "dog", "bird", "house", "tree", "sees", "likes", "near", "red", "blue", "green"),
    *("small", "big", "and", ".", ",", "name", "food", "area", "tell", "me", "about"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> {% endif %}"
)


def texts(count: int = 24) -> list[str]:
    """Short prompts that share their boilerplate and differ in what they are about."""
    colours, sizes, animals = ("red", "blue", "green"), ("small", "big"), ("cat", "dog", "bird", "tree")
    return [f"tell me about the {sizes[i % 2]} {colours[i % 3]} {animals[i % 4]} near a house" for i in range(count)]


def save(folder: Path, *, conversations: bool = False) -> tuple[Path, Path]:
    """Write a two-layer Llama and prompts; returns the model's folder and the JSONL file.

    Args:
        folder: where to write.
        conversations: write the prompts as chat messages instead of texts.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    model_folder, prompts = folder / "start", folder / "prompts.jsonl"
    LlamaForCausalLM(config).save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    rows = [{"prompt": [{"role": "user", "content": text}] if conversations else text} for text in texts()]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model_folder, prompts
