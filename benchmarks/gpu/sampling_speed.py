"""Sampled tokens per second against what the memory's bandwidth allows: each token reads all weights and its row's cache once."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.random_policy import random_policy, random_prompts
from benchmarks.gpu.setting import Keep, Setting

BATCHES = ((1, 1), (1, 16), (8, 8))
"""Prompts, and answers to each."""


def measure(setting: Setting, keep: Keep) -> None:
    """The bandwidth of a copy, then a batch after the other."""
    from cagsr.config import SamplingConfig
    from cagsr.rollout.rows import prompt_batch
    from cagsr.rollout.sample import sample_responses

    bandwidth = _bandwidth(setting)
    keep("copy in memory, bytes read and written", {"GB/s": bandwidth / 1e9})
    prompt, response = setting.pick((512, 128), (8, 6))
    policy = random_policy(setting, setting.size("1.5B"), prompt + response)

    def sample(prompts: int, many: int, length: int) -> None:
        batch = prompt_batch(policy, random_prompts(policy, prompts, prompt), many)
        sampling = SamplingConfig(max_new_tokens=length, min_new_tokens=length, num_generations=many)
        with policy.autocast():
            sample_responses(policy, batch, sampling)

    for prompts, many in setting.pick(BATCHES, ((2, 2),)):
        sample(prompts, many, min(4, response))  # warm up
        first, whole = (
            statistics.median(
                setting.seconds(partial(sample, prompts, many, length)) for _ in range(setting.pick(2, 1))
            )
            for length in (1, response)
        )
        rows = prompts * many
        speed = rows * (response - 1) / max(1e-9, whole - first)
        limit = rows * bandwidth / _bytes_per_step(policy.model, rows, prompt + response // 2)
        keep(
            f"{prompts} prompts x {many} answers, {prompt}+{response} tokens",
            {
                "tokens/s": speed,
                "limit by bandwidth": limit,
                "share": speed / limit,
                "s, prompts read": first,
                "s": whole,
            },
        )


def _bandwidth(setting: Setting) -> float:
    """Bytes per second of a copy from the device to itself."""
    size = setting.pick(2**31, 2**20)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    return 2 * size / setting.in_turn({"copy": partial(target.copy_, source)})["copy"]


def _bytes_per_step(model: Any, rows: int, positions: int) -> float:
    """Weights, each once (of an embedding that is no head only the rows that are looked up), and keys and values so far."""
    config, head = model.config, model.get_output_embeddings().weight
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    embedding = model.get_input_embeddings().weight
    if embedding is not head:
        weights -= embedding.numel() * embedding.element_size()
    width = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * width * head.element_size()
    return float(weights + rows * positions * cache)
