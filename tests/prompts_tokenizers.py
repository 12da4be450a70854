"""Tiny tokenizers, built on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = ["the cat sat on the mat", "a small brown dog", "name[Blue Spice], area[city centre]"]
TINY_STORIES = Path(__file__).parents[2] / "shared" / "models" / "TinyStories-656K"


def word_level(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark: cat -> 1 token."""
    words = sorted({w for s in SENTENCES for w in s.replace("[", " ").replace("]", " ").replace(",", " ").split()})
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "[", "]", ",", ".", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_bpe(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind, with hardly any merges: words fall into pieces, each byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=275,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML if chat else None,
    )


def tiny_stories() -> PreTrainedTokenizerFast:
    if not TINY_STORIES.is_dir():
        pytest.skip(f"{TINY_STORIES} is absent")
    return AutoTokenizer.from_pretrained(TINY_STORIES)
