"""The policy of a run's best evaluation, kept beside its checkpoints and restored at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from cagsr.runs.checkpoint import CheckpointState, latest_checkpoint, load_checkpoint, save_checkpoint
from cagsr.support.processes import broadcast

FOLDER = "best"
METRICS = ("eval/metric_greedy", "eval/metric")
"""By which of a run's evaluations the best is known: the first that it has."""


@dataclass(frozen=True)
class Best:
    """Where it lies, and what of it is kept; of the main process and all others alike."""

    folder: Path
    modules: Mapping[str, nn.Module]
    trainable_only: bool
    accelerator: Accelerator

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Keep the policy if this evaluation is better than the best so far (of equals the earlier one stays); whether it was."""
        value = next((float(metrics[name]) for name in METRICS if name in metrics), None)
        if value is None:
            return False
        known = self.known()
        if known is not None and known[0] != step and known[1] >= value:
            return False
        state = self._state({"metric": value})
        save_checkpoint(self.folder, step, state, 1, write=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        return True

    def known(self) -> tuple[int, float] | None:
        """Step and metric of the best so far; None: nothing was evaluated yet."""

        def read() -> tuple[int, float] | None:
            found = latest_checkpoint(self.folder)
            if found.path is None:
                return None
            return found.step, float(json.loads((found.path / "extra.json").read_text(encoding="utf-8"))["metric"])

        return broadcast(read, self.accelerator)

    def restore(self) -> int | None:
        """Put the best policy back into the modules; its step, None where none was kept. Raises RunError as ``load_checkpoint``."""
        path = broadcast(lambda: latest_checkpoint(self.folder).path, self.accelerator)
        if path is None:
            return None
        step, _, _ = load_checkpoint(
            path, self._state({}), self.accelerator.process_index, self.accelerator.num_processes
        )
        return step

    def _state(self, extra: Mapping[str, float]) -> CheckpointState:
        return CheckpointState(self.modules, {}, extra, self.trainable_only)
