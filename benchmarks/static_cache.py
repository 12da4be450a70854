"""``python -m benchmarks.static_cache``: would a static cache, or a compiled model on one, speed decoding up here?

Plain ``generate`` of transformers on the benchmark's 30M model: a growing cache, a static cache, and a static cache under
``torch.compile``, in turn, in processor seconds. A static cache keeps every row to the end and a prompt as often as it
has answers, so what our loop spares (``cagsr.rollout.decode``) has to be made up for before it is any gain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ANSWERS, PROMPT, RESPONSE = 8, 256, 64


def main(argv: Sequence[str] | None = None) -> None:
    """Time the three in turn and print ratios to the growing cache."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each decodes (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=PROMPT + RESPONSE,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(5, 8000, (ANSWERS, PROMPT))
    plain: Callable[..., Any] = model.forward
    compiled: Callable[..., Any] = torch.compile(plain, dynamic=False)

    def decode(forward: Callable[..., Any], static: bool) -> float:
        model.forward = forward
        start = time.process_time()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=RESPONSE, min_new_tokens=RESPONSE,
                do_sample=True, pad_token_id=0, eos_token_id=2, cache_implementation="static" if static else None,
            )  # fmt: skip
        return time.process_time() - start

    variants = {"growing": (plain, False), "static": (plain, True), "static, compiled": (compiled, True)}
    for name, variant in variants.items():  # does not count: buffers, and the compiler
        start = time.perf_counter()
        decode(*variant)
        sys.stdout.write(f"{name}: first call {time.perf_counter() - start:.0f} s\n")
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        seconds = {name: decode(*variant) for name, variant in variants.items()}
        for name, value in seconds.items():
            ratios[name].append(value / seconds["growing"])
    for name, found in ratios.items():
        sys.stdout.write(f"{name}: {statistics.median(found):.2f} times ({min(found):.2f} to {max(found):.2f})\n")


if __name__ == "__main__":
    main()
