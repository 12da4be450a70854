"""``python -m benchmarks.one_layer``: reading one layer with and without the kernel's log-sum-exp, one thread.

Processor time, not the clock's, least of several: a busy machine hardly shows in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from cagsr.attention import AttentionRegion
from cagsr.attention.intercept import Intercepted
from cagsr.attention.logsumexp import LogSumExpRecorder
from cagsr.attention.plan import plan_region
from cagsr.attention.probabilities import Softmax
from cagsr.attention.rows import add_prompt_attention

KEY_HEADS, WIDTH = 4, 64
CASES = ((4, 8, 256, 128), (1, 8, 2048, 256), (1, 12, 2048, 256), (1, 8, 8192, 256))


def least(run: Callable[[], object], rounds: int = 9) -> float:
    """Milliseconds of processor time of the cheapest round."""
    run()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def measure(batch: int, heads: int, prompt: int, response: int) -> tuple[float, float, float]:
    """Milliseconds of the layer's own attention, of reading it over all keys, and of reading the columns alone."""
    length = prompt + response
    query = torch.randn(batch, length, heads, WIDTH).transpose(1, 2)
    key = torch.randn(batch, length, KEY_HEADS, WIDTH).transpose(1, 2)

    def attention() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)

    with LogSumExpRecorder() as recorder:
        attention()
    known = Intercepted("sdpa", query, key, None, {}, recorder.found(query))
    region = AttentionRegion.left_padded(torch.ones(batch, prompt), torch.ones(batch, response))
    buffer = torch.zeros(region.shape)

    def read(call: Intercepted) -> None:
        for piece in plan_region(region, call, causal=True):
            add_prompt_attention(buffer, call, piece, Softmax(WIDTH**-0.5))

    return least(attention, 3), least(lambda: read(replace(known, logsumexp=None))), least(lambda: read(known))


def main() -> None:
    """Print a line for each case."""
    torch.set_num_threads(1)
    with torch.no_grad():
        for case in CASES:
            own, all_keys, columns = measure(*case)
            batch, heads, prompt, response = case
            sys.stdout.write(
                f"{batch}x({prompt}+{response}), {heads} heads: attention itself {own:.1f} ms, read over all keys "
                f"{all_keys:.1f} ms, columns alone {columns:.1f} ms\n"
            )


if __name__ == "__main__":
    main()
