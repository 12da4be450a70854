"""The quickstart's start model: a word tokenizer and a tiny Llama, trained from nothing on the hasty annotator's pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cagsr.config import DataConfig, ModelConfig, SftConfig
from cagsr.quickstart.task import all_words, make_pairs
from cagsr.runs.atomic import write_text_atomically
from cagsr.sft import sft

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer of the task's words: one token a word, another for each punctuation mark.

    Words carry the space before them ("▁Mara"), so decoding gives back the text; pad, bos and eos are distinct.
    """
    specials = [PAD, BOS, EOS, UNKNOWN]
    pieces = [*specials, *(f"▁{word}" for word in all_words()), ".", ",", ":", ";"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
            pre_tokenizers.Split(Regex(r"[.,:;]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int = 128, layers: int = 2, heads: int = 4
) -> LlamaForCausalLM:
    """Build a Llama with random weights for the tokenizer's words (376,000 parameters at the default size)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Three times the usual: at 0.02 so small a model takes thousands of steps to discover that it can copy a value
        # from the prompt, at 0.06 a few hundred.
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def save_blank(folder: Path, seed: int) -> None:
    """Save the untrained model and its tokenizer, as ``cagsr sft --from_scratch`` takes them."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_start(folder: Path, seed: int, *, pairs: int = 12000, steps: int = 900, quiet: bool = False) -> Path:
    """Train the start model from random weights on the hasty annotator's pairs, as ``cagsr sft --from_scratch`` does.

    Args:
        folder: gets ``pairs.jsonl``, ``blank/`` (the untrained model) and ``start/`` (the result).
        seed: seeds the pairs, the random weights and their order.
        pairs: how many pairs the annotator writes.
        steps: gradient steps of 16 pairs.
        quiet: print nothing.

    Returns:
        ``folder/start``, a model in Hugging Face layout with its tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "pairs.jsonl", make_pairs(pairs, seed))
    save_blank(folder / "blank", seed)
    config = SftConfig(
        model=ModelConfig(path=str(folder / "blank"), device="cpu"),
        data=DataConfig(path=str(folder / "pairs.jsonl")),
        output_dir=str(folder / "start"),
        from_scratch=True,
        steps=steps,
        batch_size=16,
        learning_rate=1.5e-3,
        lr_scheduler="linear",
        warmup_ratio=0.05,
        save_every=0,
        seed=seed,
        overwrite=True,
    )
    return sft(config, quiet=quiet)


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSONL, one object a line."""
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
