"""A small Whisper of random weights for the world's sounds, its feature extractor and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from examples.audio.world import NAMES, RATE, SECONDS
from examples.generated.write import word_tokenizer

OPENING = ("<|startoftranscript|>", "<|notimestamps|>")
SPECIAL = ("<pad>", "<bos>", "<eos>", *OPENING)
BANDS = 40
"""Of a frame's spectrum."""


def extractor() -> Any:
    """What makes features of sounds: Whisper's, for clips of two seconds."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(BANDS, RATE, chunk_length=round(SECONDS))


def tokenizer() -> Any:
    """A token for each word, with the space before it."""
    return word_tokenizer(list(NAMES), SPECIAL, template=None)


def untrained(tokenizer: Any, seed: int, *, width: int = 96) -> Any:
    """A Whisper of random weights, with two layers in its encoder and two in its decoder."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    start, times = tokenizer.convert_tokens_to_ids(list(OPENING))
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=BANDS,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_source_positions=round(50 * SECONDS),
        max_target_positions=32,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **ids,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        suppress_tokens=[start, times, ids["pad_token_id"], ids["bos_token_id"], tokenizer.unk_token_id],
        begin_suppress_tokens=[ids["eos_token_id"]],
        is_multilingual=False,
        **ids,
    )
    return model
