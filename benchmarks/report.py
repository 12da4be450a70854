"""What every benchmark writes beside its numbers: where they were measured, and how busy the machine was."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""Where the JSON lies unless another place is named (ignored by git)."""


def machine(threads: int) -> dict[str, Any]:
    """Versions and processor."""
    return {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "trl": version("trl"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def load() -> float:
    """Processes that ran or wanted to, averaged over the last minute; ours included once it has run."""
    return round(os.getloadavg()[0], 2)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
