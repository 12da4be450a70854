"""Where a part measures and how large: a GPU with the sizes it is about, or a CPU with tiny ones to see that all runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

SIZES: Mapping[str, dict[str, Any]] = {
    # As Qwen 2.5's of these sizes, with random weights.
    "1.5B": {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7B": {
        "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip

Keep = Callable[[str, Mapping[str, Any]], None]
"""Takes what was measured: in words, and figures by name. Each is kept at once."""


@dataclass(frozen=True)
class Setting:
    """A part's machine."""

    dry_run: bool = False

    @property
    def device(self) -> torch.device:
        """The GPU; in a dry run the CPU."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.dry_run else torch.bfloat16

    @property
    def rounds(self) -> int:
        """How often a thing is measured."""
        return 1 if self.dry_run else 7

    def size(self, name: str) -> str:
        """The size of model that is taken where ``name`` is asked for."""
        return "tiny" if self.dry_run else name

    def pick(self, full: Any, tiny: Any) -> Any:
        """One of two, by whether this is a dry run."""
        return tiny if self.dry_run else full

    def seconds(self, run: Callable[[], object]) -> float:
        """How long ``run`` takes until the device has done it."""
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def in_turn(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of several things, each once to warm up, then in turn, the order rotated from round to round."""
        names = list(runs)
        for name in names:
            runs[name]()
        found: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(self.seconds(runs[name]))
        return {name: statistics.median(times) for name, times in found.items()}

    def peak_mebibytes(self, run: Callable[[], object]) -> float | None:
        """How far the device's memory rises during ``run``; None on a CPU."""
        if self.dry_run:
            run()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if not self.dry_run:
            torch.cuda.synchronize()


def random_model(setting: Setting, size: str, positions: int) -> Any:
    """A Llama with random weights, made on the device in its precision."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=positions, pad_token_id=0, bos_token_id=None, eos_token_id=1, **SIZES[size]
    )
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(config, dtype=setting.dtype).eval()
