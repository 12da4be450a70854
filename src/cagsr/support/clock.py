"""Where the time of a step goes: seconds of named parts, and the operators that take most of them."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("rollout", "scoring", "comparison", "reference", "reward", "forward", "backward", "optimizer", "evaluation")
"""The parts of a training step, in their order."""
OPERATORS = 10
"""Operators named in a profile."""


class Clock:
    """Adds up the seconds of named parts.

    ``exact`` waits for an accelerator at both ends of a part. Without it a part on a GPU holds only the time until the work was
    handed over; the waiting slows training down a little.
    """

    def __init__(self, device: torch.device, *, exact: bool = False) -> None:
        self._wait = exact and device.type == "cuda"
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block to a part."""
        began = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - began

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> float:
    """The most memory held so far: allocated on the CUDA device, else resident in this process (its whole life)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def operators_of(found: list[tuple[str, float, int]], device: torch.device) -> Iterator[None]:
    """Record the operators that run inside the ``with`` block.

    ``found`` is filled with ``(name, seconds of its own, calls)``, the costliest first, at most ``OPERATORS``; on CUDA the
    seconds are the device's, else the CPU's.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        yield
    events = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in recorded.key_averages()
    ]
    found.extend(sorted(events, key=lambda event: -event[1])[:OPERATORS])


def profile_text(steps: Sequence[Mapping[str, float]], operators: Sequence[tuple[str, float, int]]) -> str:
    """Say where the time went, as Markdown: parts (seconds a step, share of all), tokens per second, memory, operators.

    ``steps`` are rows of ``timings.jsonl``, ``operators`` those of one step, from :func:`operators_of`.
    """
    count = max(1, len(steps))
    whole = sum(row["collect_seconds"] + row["update_seconds"] + row["evaluation_seconds"] for row in steps)
    parts = {name: sum(row.get(f"{name}_seconds", 0.0) for row in steps) for name in PARTS}
    parts["other"] = max(0.0, whole - sum(parts.values()))
    lines = [f"Where the time of {len(steps)} steps went:", "", "| part | s / step | share |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {seconds / count:.3f} | {seconds / max(whole, 1e-9):.1%} |" for name, seconds in parts.items()
    ]
    stepping = max(1e-9, whole - parts["evaluation"])
    answered = sum(row["response_tokens"] for row in steps)
    lines += ["", f"Answers: {answered / stepping:,.0f} tokens per second of rollout, scoring and update."]
    if steps:
        lines.append(f"Peak memory: {max(row['peak_memory_bytes'] for row in steps) / 2**20:,.0f} MiB.")
    if operators:
        lines += ["", "Costliest operators of one step:", "", "| operator | s of its own | calls |", "|---|---:|---:|"]
        lines += [f"| {name} | {seconds:.3f} | {calls} |" for name, seconds, calls in operators]
    return "\n".join(lines) + "\n"
