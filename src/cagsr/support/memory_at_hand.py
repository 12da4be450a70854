"""How much memory a device has left for this process, as the system or a container's limit says."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")


def memory_at_hand(device: torch.device) -> int:
    """Bytes that can still be taken: of a GPU its free memory, else what the machine and its cgroups leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """What the limit of each control group around this process leaves (Linux, version 2, and the outermost of version 1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    here = _CGROUPS / own
    for folder in (here, *here.parents):
        if _CGROUPS in (folder, *folder.parents):
            yield from _left(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")
    old = _CGROUPS / "memory"
    yield from _left(
        old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat", "total_inactive_file"
    )


def _left(limit: Path, used: Path, stat: Path, cache: str) -> Iterator[int]:
    try:
        most, taken = int(limit.read_text()), int(used.read_text())  # "max": no limit
        counts = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return
    yield max(0, most - taken + int(counts.get(cache, 0)))  # cached files make room
