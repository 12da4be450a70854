"""Reading the prompt attention at 1.5B in bfloat16: our kernel, its reference and eager maps, beside a plain forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Keep, Setting, random_model

CASES = ((8, 1024, 256), (2, 4096, 256))
"""Sequences, tokens of a prompt and of an answer; prompts are padded, from half the length on."""


def measure(setting: Setting, keep: Keep) -> None:
    """Time, memory and agreement, case by case."""
    from cagsr.attention import PromptAttentionReader

    cases = setting.pick(CASES, ((2, 12, 6),))
    model = random_model(setting, setting.size("1.5B"), sum(max(cases, key=lambda case: case[1])[1:])).base_model
    readers = {f"{layers} layers": PromptAttentionReader(model, layers=layers) for layers in ("last-4", "all")}
    for case in cases:
        _measure_case(setting, keep, model, readers, case)


def _measure_case(
    setting: Setting, keep: Keep, model: Any, readers: dict[str, Any], case: tuple[int, int, int]
) -> None:
    name = f"{case[0]} x ({case[1]}+{case[2]})"
    inputs, region = _batch(setting, model.config.vocab_size, case)

    @torch.no_grad()
    def plain() -> None:
        model(**inputs)

    @torch.no_grad()
    def read(layers: str) -> Tensor:
        with readers[layers].read(region) as reading:
            model(**inputs)
        return reading.attention

    @torch.no_grad()
    def eager() -> Tensor:
        model.set_attn_implementation("eager")
        try:
            maps = model(**inputs, output_attentions=True).attentions
        finally:
            model.set_attn_implementation("sdpa")
        width = region.columns.shape[1]
        return sum(layer[:, :, width - 1 : -1, :width].float().mean(1) for layer in maps[-4:]) / 4

    def reference(layers: str) -> Tensor:
        with _without_kernel():
            return read(layers)

    expected = reference("last-4 layers")
    with _kernel_calls() as calls:
        found = read("last-4 layers")
    runs: dict[str, Any] = {"plain forward": plain, "last 4 layers, reference": partial(reference, "last-4 layers")}
    if calls:
        keep(
            f"{name}: kernel against reference",
            {"largest difference": _difference(found, expected), "calls": len(calls)},
        )
        runs |= {f"{layers.replace('-', ' ')}, kernel": partial(read, layers) for layers in readers}
    else:
        why = (
            "no Triton on a CPU"
            if setting.dry_run
            else "the model's attention gave no log-sum-exp, or Triton is missing"
        )
        keep(f"{name}: kernel", {"left out": why})
        runs["all layers, reference"] = partial(reference, "all layers")
    try:
        maps = eager() * region.valid(expected.device)
        keep(f"{name}: eager against reference", {"largest difference": _difference(maps, expected)})
        del maps
        runs["eager maps"] = eager
    except torch.cuda.OutOfMemoryError:
        keep(f"{name}: eager maps", {"left out": "out of memory"})
    seconds = setting.in_turn(runs)
    peaks = {variant: setting.peak_mebibytes(run) for variant, run in runs.items()}
    for variant, value in seconds.items():
        figures = {
            "ms": 1000 * value,
            "of plain": value / seconds["plain forward"],
            "MiB above the model": peaks[variant],
        }
        keep(f"{name}: {variant}", figures)


def _batch(setting: Setting, vocabulary: int, case: tuple[int, int, int]) -> tuple[dict[str, Any], Any]:
    from cagsr.attention import AttentionRegion

    count, prompt, response = case
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (count, prompt + response), generator=generator).to(setting.device)
    lengths = torch.linspace(prompt // 2, prompt, count).long()
    prompts = torch.arange(prompt) >= prompt - lengths[:, None]
    answers = torch.ones(count, response, dtype=torch.bool)
    mask = torch.cat([prompts, answers], 1).to(setting.device)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    return inputs, AttentionRegion.left_padded(prompts.to(setting.device), answers.to(setting.device))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@contextmanager
def _without_kernel() -> Iterator[None]:
    from cagsr.attention import rows

    own = rows._kernel
    rows._kernel = lambda device: None  # type: ignore[assignment]
    try:
        yield
    finally:
        rows._kernel = own


@contextmanager
def _kernel_calls() -> Iterator[list[int]]:
    """Note each call of the kernel: a model whose attention it can't take is read by the reference, without a word."""
    from cagsr.attention import rows

    own, calls = rows._kernel, list[int]()

    def noted(device: torch.device) -> Any:
        kernel = own(device)
        if kernel is None:
            return None

        def run(*args: Any) -> None:
            calls.append(1)
            kernel(*args)

        return run

    rows._kernel = noted  # type: ignore[assignment]
    try:
        yield calls
    finally:
        rows._kernel = own
