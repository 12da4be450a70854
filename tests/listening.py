"""A tiny real Whisper with its feature extractor and tokenizer, made from a config with random weights; and short sounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import tiny
from cagsr.models.sounds import as_data_url

RATE, STATES, MELS = 16000, 50, 8
"""Samples a second; encoder states, of 20 ms each: a model that hears one second; bands of a frame."""
MARKS = [
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|startofprev|>",
    "<|notimestamps|>",
]
OPENING = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of :mod:`tiny`, with what opens a transcript."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def save_model(folder: Path, *, seed: int = 0, scale: float = 4.0, multilingual: bool = True) -> Path:
    """Save a random Whisper, sharp enough to listen somewhere, with its feature extractor; returns the folder."""
    torch.manual_seed(seed)
    own = tokenizer()
    ids = dict(zip(MARKS, own.convert_tokens_to_ids(MARKS), strict=True))
    config = WhisperConfig(
        vocab_size=len(own), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=STATES, max_target_positions=40, num_mel_bins=MELS,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=ids[MARKS[0]], suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.mul_(scale * (20 if "encoder_attn.k" in name else 1))
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=ids[MARKS[0]],
        suppress_tokens=[*ids.values(), 3], begin_suppress_tokens=[2],
        forced_decoder_ids=[[1, None], [2, ids["<|transcribe|>"]]],  # as published models have it
        is_multilingual=multilingual, no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
    )  # fmt: skip
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    WhisperFeatureExtractor(MELS, RATE, chunk_length=1).save_pretrained(folder)
    return folder


def sound(*parts: tuple[float, float], rate: int = RATE) -> np.ndarray:
    """Parts of (Hz, seconds) one after the other; 0 Hz is silence."""
    return np.concatenate([
        0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate) for hertz, seconds in parts
    ]).astype(np.float32)  # fmt: skip


def clip(*parts: tuple[float, float]) -> dict[str, Any]:
    """A sound as datasets gives a decoded one."""
    return {"array": sound(*parts), "sampling_rate": RATE}


CLIPS = (clip((400, 0.3), (0, 0.2), (900, 0.2)), clip((0, 0.1), (1500, 0.5)))


def save_rows(folder: Path, count: int = 4, prompts: Sequence[str] = ("",), **columns: Any) -> Path:
    """Save prompts with a sound as JSON lines, the sounds within them; returns the file."""
    rows = []
    for number in range(count):
        made = sound((400 + 200 * number, 0.2 + 0.05 * number), (0, 0.1), (1500, 0.1))
        rows.append({"prompt": prompts[number % len(prompts)], "audio": as_data_url(made, RATE), **columns})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
