"""What reading the prompt attention costs beside the plain forward, in time and in memory.

Time: all variants in one process, in turn, the order rotated from round to round, so that a busy machine slows all of
them alike; the figure is the median over rounds of the ratio to the same round's plain forward. Memory: a process of its
own for each case; the highest resident size during a forward (Linux resets the mark through ``/proc/self/clear_refs``)
less the resident size of the idle model just before it.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks import memory
from cagsr.attention import AttentionRegion, PromptAttentionReader

MODELS = {
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "125M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
VOCABULARY = {"30M": 8192, "125M": 50304}
VARIANTS = ("plain", "last-4", "all", "eager")
ALL_LAYERS_BAR = 1.15
"""Of the time of reading every layer; the bars of the last 4 layers are each case's own."""


@dataclass(frozen=True)
class Case:
    """One size of model and batch."""

    model: str
    prompt: int
    response: int
    batch: int
    padded: bool
    """Prompts of unequal length, padded on the left; else all full, where sdpa needs no mask and is fastest."""
    rounds: int
    """The shorter a forward the more: rounds of the same thing differ by a tenth on a virtual machine."""
    eager_rounds: int
    """0: not at all, where its maps do not fit into a small machine."""
    bar: float = 1.05
    """What reading the last 4 layers may cost, in time and in memory, beside the plain forward."""

    @property
    def name(self) -> str:
        """One line for the table."""
        padding = " padded" if self.padded else ""
        return f"{self.model} {self.batch}x({self.prompt}+{self.response}){padding}"


@dataclass(frozen=True)
class Measured:
    """One variant of one case."""

    case: str
    variant: str
    seconds: float
    """Median over the rounds."""
    time_ratio: float
    """Median over the rounds of the ratio to the plain forward of the same round."""
    fastest_ratio: float
    """Fastest round over the plain forward's fastest round: less shaken by a busy machine."""
    mebibytes: float
    """Peak above the idle model."""
    memory_ratio: float


def cases(fast: bool) -> list[Case]:
    """All cases of the benchmark, or those of the smaller model only, with fewer rounds."""
    small = [
        Case("30M", 256, 128, 4, False, 25, 2),
        Case("30M", 256, 128, 4, True, 25, 2),
        Case("30M", 2048, 256, 1, False, 21, 1),
    ]
    large = [
        Case("30M", 8192, 256, 1, False, 5, 0, bar=1.10),
        Case("125M", 256, 128, 4, False, 15, 1),
        Case("125M", 2048, 256, 1, False, 9, 1),
        Case("125M", 8192, 256, 1, False, 3, 0, bar=1.10),
    ]
    return small if fast else small + large


class Workload:
    """A random model and a batch, ready to run each variant."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        length = case.prompt + case.response
        self.config = LlamaConfig(
            vocab_size=VOCABULARY[case.model],
            num_key_value_heads=4,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            **MODELS[case.model],
        )
        # The backbone alone: logits would make the plain forward look costlier and capture cheaper.
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config).base_model.eval()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(10, self.config.vocab_size, (case.batch, length), generator=generator)
        shortest = case.prompt // 2 if case.padded else case.prompt
        lengths = torch.linspace(shortest, case.prompt, case.batch).long()
        prompt_mask = torch.arange(case.prompt) >= case.prompt - lengths[:, None]
        response_mask = torch.ones(case.batch, case.response, dtype=torch.bool)
        mask = torch.cat([prompt_mask, response_mask], 1)
        self.inputs = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
            "use_cache": False,
        }
        self.region = AttentionRegion.left_padded(prompt_mask, response_mask)
        self.readers = {name: PromptAttentionReader(self.model, layers=name) for name in ("last-4", "all")}

    def run(self, variant: str) -> torch.Tensor | None:
        """One forward; the prompt attention of the variants that read it, ``(batch, response, prompt)``."""
        with torch.no_grad():
            if variant == "plain":
                self.model(**self.inputs)
                return None
            if variant == "eager":
                self.model.set_attn_implementation("eager")
                try:
                    maps = self.model(**self.inputs, output_attentions=True).attentions
                finally:
                    self.model.set_attn_implementation("sdpa")
                width = self.region.columns.shape[1]
                return sum(layer[:, :, width - 1 : -1, :width].mean(1) for layer in maps[-4:]) / 4
            with self.readers[variant].read(self.region) as reading:
                self.model(**self.inputs)
            return reading.attention


def measure_time(case: Case) -> dict[str, list[float]]:
    """Seconds of each variant in each round; eager, which is slow, in the first rounds only."""
    workload = Workload(case)
    read = workload.run("last-4")
    if case.eager_rounds:
        eager = workload.run("eager")
        assert read is not None
        assert eager is not None
        torch.testing.assert_close(read, eager * workload.region.valid(read.device), rtol=0, atol=1e-5)
        del eager
    workload.run("all")
    workload.run("plain")
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(case.rounds):
        order = VARIANTS[number % len(VARIANTS) :] + VARIANTS[: number % len(VARIANTS)]
        for variant in order:
            if variant == "eager" and number >= case.eager_rounds:
                continue
            start = time.perf_counter()
            workload.run(variant)
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def measure_memory(case: Case, threads: int) -> dict[str, float]:
    """MiB of each variant above the idle model, in a process of its own."""
    # Large blocks go back to the system as soon as they are freed: the peak is of what is held at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.capture", json.dumps(asdict(case)), str(threads)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    if done.returncode:
        raise RuntimeError(f"The memory of case {case.name} could not be measured: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(case: Case, seconds: dict[str, list[float]], memory: dict[str, float]) -> list[Measured]:
    """Ratios to the plain forward."""
    return [
        Measured(
            case=case.name,
            variant=variant,
            seconds=statistics.median(times),
            time_ratio=statistics.median(own / plain for own, plain in zip(times, seconds["plain"], strict=False)),
            fastest_ratio=min(times) / min(seconds["plain"][: len(times)]),
            mebibytes=memory[variant],
            memory_ratio=memory[variant] / memory["plain"],
        )
        for variant, times in seconds.items()
        if times
    ]


def peak_of(run: Callable[[], object]) -> float:
    """MiB by which the resident size rises during ``run``."""
    gc.collect()
    if not memory.can_measure():  # elsewhere: the highest size since the start of the process
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest) / unit
    memory.reset_peak()
    before = memory.resident()
    run()
    return memory.peak() - before


def _main(case: Case) -> None:
    workload = Workload(case)
    # Libraries allocate their own buffers at the first call; they belong to the idle model. Eager is not run for that.
    workload.run("plain")
    workload.run("all")
    variants = [variant for variant in VARIANTS if variant != "eager" or case.eager_rounds]
    peaks = {variant: peak_of(partial(workload.run, variant)) for variant in variants}
    sys.stdout.write(json.dumps(peaks) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    _main(Case(**json.loads(sys.argv[1])))
