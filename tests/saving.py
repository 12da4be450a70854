"""What a process does that is killed while it saves checkpoints (test_runs_checkpoint.py); quickly imported."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cagsr.runs.checkpoint import CheckpointState, save_checkpoint


def save_without_pause(folder: Path, first: int) -> None:
    """Save steps from ``first`` on, each with its number as weights."""
    torch.set_num_threads(1)
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
    print("begun", flush=True)
    for step in range(first, 10**6):
        for layer in model:
            nn.init.constant_(layer.weight, float(step))
        save_checkpoint(folder, step, CheckpointState(modules={"m": model}, extra={"step": step}), keep=1)
