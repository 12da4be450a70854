"""What a run shows while it goes on: a bar on a terminal, plain lines elsewhere, nothing on other processes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "loss": ("loss",),
    "reward": ("objective/raw_scores", "objective/scores"),
    "kl": ("objective/kl",),
    "length": ("response/length",),
    "held-out": ("eval/metric",),
}
"""The numbers beside the bar: label and the metrics of which the first one present is shown."""


def live_numbers(metrics: Mapping[str, float]) -> str:
    """Put a few numbers of a step in one short text, as ``reward 0.61  kl 1.25  length 34.1``."""
    parts = []
    for label, names in SHOWN.items():
        value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
        if value is not None and not math.isnan(float(value)):
            parts.append(f"{label} {float(value):.3g}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingProgress:
    """Progress over the steps of a run, as a context manager.

    Args:
        total: steps of the whole run.
        done: steps done before (a resumed run).
        main_process: False prints nothing at all.
        lines: about how many plain lines a run prints where there is no terminal.
        console: where to print; None: standard error, so that standard output stays clean.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        main_process: bool = True,
        lines: int = 20,
        console: Console | None = None,
    ) -> None:
        self._total = total
        self._begun_at = done
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._silent = not main_process
        self._every = max(1, total // max(1, lines))
        self._started = time.monotonic()
        self._latest: dict[str, float] = {}
        self._bar: Progress | None = None
        if main_process and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[cyan]{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, rate="", numbers="")

    def __enter__(self) -> TrainingProgress:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, sentence: str) -> None:
        """Print a line above the bar: a note or a warning."""
        if not self._silent:
            self._console.print(sentence, markup=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with their numbers."""
        if self._silent:
            return
        # Evaluations are rarer than steps: the last held-out value stays in view.
        self._latest.update(metrics)
        numbers = live_numbers(self._latest)
        seconds = time.monotonic() - self._started
        per_step = seconds / max(1, step - self._begun_at)
        rate = f"{per_step:.1f} s/step" if per_step >= 1 else f"{1 / max(per_step, 1e-9):.1f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=rate, numbers=numbers)
        elif step % self._every == 0 or step == self._total or step == self._begun_at + 1:
            left = _duration(per_step * (self._total - step))
            self._console.print(f"step {step}/{self._total}  {rate}  left {left}  {numbers}", markup=False)
