"""A whole step of ours against TRL's GRPO at equal work, in turn, each in a process of its own; ours alone where TRL is missing."""

from __future__ import annotations

import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bare_checkout import is_there
from benchmarks.gpu.setting import Keep, Setting
from benchmarks.turns import Step, System
from benchmarks.workload import Work, save_start


def measure(setting: Setting, keep: Keep) -> None:
    """Steps in turn, then one more each for its memory."""
    work = setting.pick(
        Work("", "116M", prompt=256, response=128, prompts=8, generations=8, micro_batch=16, device="cuda"),
        Work("", "tiny", prompt=12, response=8, prompts=2, generations=4, micro_batch=4),
    )
    name = f"{work.model}, {work.prompts} x {work.generations} x ({work.prompt}+{work.response}), {work.epochs} epochs"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        save_start(work, folder)
        threads = setting.pick(os.cpu_count() or 1, 1)
        ours = stack.enter_context(System("cagsr_ppo", work, folder, threads, estimator="grpo"))
        systems = {"cagsr GRPO": ours}
        if is_there("trl") and is_there("datasets"):
            systems["TRL GRPO"] = stack.enter_context(System("trl_grpo", work, folder, threads))
        else:
            keep("TRL's GRPO", {"left out": "trl or datasets is not installed; ours alone"})
        for system in systems.values():
            system.step()  # warm up
        steps: dict[str, list[Step]] = {label: [] for label in systems}
        for number in range(setting.pick(3, 1)):
            for label in list(systems) if number % 2 == 0 else list(reversed(systems)):
                steps[label].append(systems[label].step())
        memory = {label: system.step(measure_memory=True) for label, system in systems.items()}
    for label, taken in steps.items():
        stages = {f"s, {stage}": statistics.median(one.stages[stage] for one in taken) for stage in taken[0].stages}
        peak = memory[label].peak_mebibytes
        above = None if peak is None else peak - memory[label].idle_mebibytes
        keep(
            f"{name}: {label}",
            {"s": statistics.median(one.seconds for one in taken), **stages, "MiB above the model": above},
        )
    if len(steps) == 2:
        ours_taken, theirs = steps.values()
        ratios = [two.seconds / one.seconds for one, two in zip(ours_taken, theirs, strict=True)]
        keep(f"{name}: steps per second, ours over TRL's", {"median": statistics.median(ratios), "least": min(ratios)})
