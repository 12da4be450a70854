"""The parts of the benchmark: what each needs, how long it may take, and running one, here or in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bare_checkout import ROOT, is_there
from benchmarks.gpu.setting import Setting
from benchmarks.report import write_json


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    name: str
    module: str
    title: str
    seconds: float
    """How long it may take."""
    needs: tuple[str, ...] = ()
    """Modules beyond torch and transformers."""

    def missing(self) -> list[str]:
        """What it needs and is not there."""
        return [name for name in self.needs if not is_there(name)]


PARTS = (
    Part("tests", "cuda_tests", "CUDA tests", 60, ("pytest",)),
    Part("capture", "kernel_capture", "Reading the attention, 1.5B, bfloat16", 100),
    Part(
        "sampling",
        "sampling_speed",
        "Sampling, 1.5B, bfloat16",
        90,
        ("accelerate", "jinja2", "numpy", "regex", "scipy"),
    ),
    Part(
        "step", "step_against_trl", "A whole step against TRL's GRPO", 110, ("accelerate", "jinja2", "regex", "scipy")
    ),
    Part("lora", "lora_step", "A LoRA step at 7B", 90, ("accelerate", "peft", "jinja2", "regex", "scipy")),
)
"""In the order in which they run: what is least likely to be known comes first."""


@dataclass
class Result:
    """What a part made."""

    name: str
    title: str
    state: str = "finished"
    """``finished``, ``left out``, ``failed`` or ``out of time``."""
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Each has ``measured``, in words, and ``figures`` by name."""


def run_here(part: Part, setting: Setting, file: Path) -> None:
    """Measure, and keep each row in ``file`` as soon as it is there."""
    rows: list[dict[str, Any]] = []

    def keep(measured: str, figures: Mapping[str, Any]) -> None:
        rows.append({"measured": measured, "figures": dict(figures)})
        write_json(file, {"rows": rows})

    importlib.import_module(f"benchmarks.gpu.{part.module}").measure(setting, keep)


def command_of(part: Part, setting: Setting, file: Path) -> list[str]:
    """The command that does the same in a process of its own, which may fail and gives all memory back."""
    return [sys.executable, "-m", "benchmarks.gpu.parts", part.name, str(file), json.dumps(asdict(setting))]


def run_apart(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run a part's command for so long at the most; its state and why."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # and the processes that it has started
            process.communicate()
            return "out of time", f"it had {seconds:.0f} s"
    if process.returncode:
        lines = [line for line in output.splitlines() if line.strip()] or ["no word"]
        return "failed", lines[-1].strip()
    return "finished", ""


def rows_of(file: Path) -> list[dict[str, Any]]:
    """What a part has kept so far."""
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return found


if __name__ == "__main__":
    from benchmarks.bare_checkout import prepare

    prepare()
    run_here(
        next(part for part in PARTS if part.name == sys.argv[1]), Setting(**json.loads(sys.argv[3])), Path(sys.argv[2])
    )
