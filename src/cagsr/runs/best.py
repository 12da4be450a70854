"""The policy of a run's best evaluation, kept beside its checkpoints and restored at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from cagsr.runs.checkpoint import (
    CheckpointState,
    checkpoint_problem,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)
from cagsr.support.atomic import remove_folder
from cagsr.support.processes import broadcast

FOLDER = "best"
METRICS = ("eval/metric_greedy", "eval/metric")
"""By which of a run's evaluations the best is known: the first that it has."""
MANY = 10**9


@dataclass(frozen=True)
class Best:
    """Where it lies, and what of it is kept; of the main process and all others alike.

    Until a checkpoint is written the best of the checkpoint before it stays too: a run that is resumed from that one knows nothing
    of what came after it.
    """

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
        if known is not None and known[1] >= value:
            return False
        save_checkpoint(self.folder, step, self._state({"metric": value}), MANY, write=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        return True

    def known(self) -> tuple[int, float] | None:
        """Step and metric of the best so far; None: nothing was evaluated yet."""
        return broadcast(lambda: max(self._kept(), key=lambda one: (one[1], -one[0]), default=None), self.accelerator)

    def resumed(self, step: int) -> None:
        """The run goes on from ``step``: what was kept of later ones is not of this run any more."""
        self._forget(lambda kept: kept > step)

    def settled(self) -> None:
        """A checkpoint was written: of what is kept the best alone is needed from now on."""
        best = self.known()
        self._forget(lambda kept: best is not None and kept != best[0])

    def restore(self) -> int | None:
        """Put the best policy back into the modules; its step, None where none was kept. Raises RunError as ``load_checkpoint``."""
        best = self.known()
        if best is None:
            return None
        path = self.folder / f"step-{best[0]:06d}"
        load_checkpoint(path, self._state({}), self.accelerator.process_index, self.accelerator.num_processes)
        return best[0]

    def _kept(self) -> list[tuple[int, float]]:
        found = [
            (step, path)
            for step, path in checkpoint_steps(self.folder)
            if checkpoint_problem(path, thorough=False) is None
        ]
        return [
            (step, float(json.loads((path / "extra.json").read_text(encoding="utf-8"))["metric"]))
            for step, path in found
        ]

    def _forget(self, which: Callable[[int], bool]) -> None:
        if self.accelerator.is_main_process:
            for step, _ in self._kept():
                if which(step):
                    remove_folder(self.folder / f"step-{step:06d}")
        self.accelerator.wait_for_everyone()

    def _state(self, extra: Mapping[str, float]) -> CheckpointState:
        return CheckpointState(self.modules, {}, extra, self.trainable_only)
