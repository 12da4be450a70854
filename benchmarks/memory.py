"""Resident memory of this process, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)


def can_measure() -> bool:
    """Whether the kernel lets a process reset the mark of its highest resident size (Linux)."""
    return Path("/proc/self/clear_refs").exists()


def give_back() -> None:
    """Free what nothing holds, and return it to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """From now on return large blocks as they are freed, so that a peak is of what is held at the same time.

    It makes allocation slower: call it after times have been measured.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    give_back()


def resident() -> float:
    """Resident size now, MiB."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Start the mark of the highest resident size anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Highest resident size since ``reset_peak``, MiB."""
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
