"""The state of every random number generator of a process."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed


def rng_state() -> dict[str, Any]:
    """The generators of this process (Python, NumPy's global, torch on CPU, every CUDA device, MPS) as numbers and CPU tensors."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> list[str]:
    """Put the generators of this process where ``rng_state`` found them; notes tell of devices where that can't be done."""
    notes = []
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    saved_cuda = state.get("cuda", [])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved_cuda and len(saved_cuda) == here:
        torch.cuda.set_rng_state_all(saved_cuda)
    elif len(saved_cuda) != here:
        notes.append(
            f"The checkpoint was written with {len(saved_cuda)} CUDA devices and there are {here} here: "
            "their random numbers start anew, so the run goes on but not bit for bit."
        )
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    elif "mps" in state or torch.backends.mps.is_available():
        notes.append("The random numbers of MPS can't be restored here, so the run goes on but not bit for bit.")
    return notes


def reseed(seed: int, step: int, rank: int, processes: int) -> None:
    """Start every generator of this process anew, from what the run is and where it stands, and nothing else."""
    text = f"{seed}/{step}/{rank}/{processes}"
    set_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))
