"""A policy with random weights and prompts for it, made in memory: nothing of its size is written to a disk."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.setting import Setting, random_model

PAD, STOP, UNKNOWN = 0, 1, 2
WORDS = 90
"""Words that prompts are written with."""


def random_policy(setting: Setting, size: str, positions: int, lora_rank: int = 0) -> Any:
    """A ``LoadedModel`` ready to sample and, with adapters, to train."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from cagsr.config import LoraConfig
    from cagsr.models.architecture import architecture_of
    from cagsr.models.load import LoadedModel, add_lora

    model = random_model(setting, size, positions)
    architecture = architecture_of(model.config)
    words = {"<pad>": PAD, "<stop>": STOP, "<unk>": UNKNOWN} | {f"w{number}": number for number in range(3, WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<stop>", unk_token="<unk>", padding_side="left"
    )
    if lora_rank:
        model = add_lora(model, LoraConfig(r=lora_rank), architecture.peft_task).to(setting.device).eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        path=f"random {size}",
        device=setting.device,
        compute_dtype=setting.dtype,
        architecture=architecture,
        stop_ids=(STOP,),
        lora=lora_rank > 0,
        notes=(),
        stored_dtype=setting.dtype,
    )


def random_prompts(policy: Any, count: int, length: int) -> list[Any]:
    """Encoded prompts of ``length`` words."""
    from cagsr.config import SalienceConfig
    from cagsr.prompts.prepare import encode_texts

    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(3, WORDS, (count, length), generator=generator).tolist()
    texts = [" ".join(f"w{number}" for number in row) for row in numbers]
    return encode_texts(texts, policy.tokenizer, SalienceConfig(weighting="uniform", skip_sink=False), length)
