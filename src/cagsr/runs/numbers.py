"""The few numbers of a training step that are shown beside its progress."""

import math
from collections.abc import Mapping

from cagsr.support.progress import Task

SHOWN = {
    "loss": ("loss",),
    "accuracy": ("accuracy", "rewards/accuracies"),
    "reward": ("objective/raw_scores", "objective/scores"),
    "kl": ("objective/kl",),
    "length": ("response/length",),
    "held-out": ("eval/metric",),
}
"""Label and the metrics of which the first one present is shown."""


def live_numbers(metrics: Mapping[str, float]) -> str:
    """Put a few numbers of a step in one short text, as ``reward 0.61  kl 1.25  length 34.1``."""
    found = {
        label: float(next((metrics[name] for name in names if metrics.get(name) is not None), math.nan))
        for label, names in SHOWN.items()
    }
    return "  ".join(f"{label} {value:.3g}" for label, value in found.items() if not math.isnan(value))


class StepNumbers:
    """Keeps the numbers beside a training's task up to date."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._latest: dict[str, float] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with their numbers."""
        # Evaluations are rarer than steps: the last held-out value stays in view.
        self._latest.update(metrics)
        self._task.done = step
        self._task.note = live_numbers(self._latest)
