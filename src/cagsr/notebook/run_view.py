"""A run as a notebook shows it: state, warnings, curves, first and last numbers, the newest answers; drawn anew while it trains."""

import base64
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cagsr.config import TrainConfig
from cagsr.html_page import fill
from cagsr.run_page.metric_curves import curves_of
from cagsr.run_page.overview_tables import glance, warnings_of
from cagsr.run_page.read_run import Run, find_run, read_run
from cagsr.run_page.sample_answers import answers_of
from cagsr.support.extras import install_command, is_installed
from cagsr.train import train as train_run

EVERY = 2.0
"""Seconds between two pictures, at least."""
SHARE = 10
"""After a picture that took a second this many pass: training must not wait for its own."""
ANSWERS, CHARACTERS = 4, 20_000
"""Newest answers that are shown, and the characters among which they are chosen."""


@dataclass(frozen=True)
class RunView:
    """A run's folder that shows itself in a notebook, as far as the run has come; a folder that is no run is told by a sentence."""

    folder: Path

    @property
    def model(self) -> Path:
        """The trained model's folder, there once the run is finished."""
        return self.folder / "final"

    def read(self) -> Run:
        """The run as it is now: metrics, warnings, answers; RunError where it can't be read."""
        return read_run(find_run(self.folder, wait=True), self.folder.name)

    def _repr_html_(self) -> str:
        """What a notebook shows: one element without scripts, and without anything that is loaded."""
        run = self.read()
        return fill(
            "notebook",
            "run.html.jinja",
            run=run,
            rows=glance([run], curves_of([run])),
            warnings=warnings_of([run]),
            picture=_picture(run),
            no_picture=None if is_installed("matplotlib") else install_command("pages"),
            answers=_newest(run),
        )


def train(config: TrainConfig) -> RunView:
    """Train as :func:`cagsr.train.train` does; in a notebook the run is shown below the cell and drawn anew while it goes on.

    Raises what that raises; what is shown then is the run as far as it came.
    """
    view = RunView(Path(config.output_dir))
    with _live(view) as draw:
        # In a notebook rich would make an output of every line.
        console = Console(soft_wrap=True, highlight=False, force_jupyter=False)
        train_run(config, console=console, after_step=draw)
    return view


@contextmanager
def _live(view: RunView) -> Iterator[Any]:
    """Show a view, and give what draws it anew after a step; outside of a notebook nothing is shown."""
    ipython = sys.modules.get("IPython")  # where a notebook runs it is there
    if ipython is None or ipython.get_ipython() is None:
        yield None
        return
    shown: Any = None
    due = 0.0

    def draw(step: int) -> None:
        nonlocal shown, due
        began = time.monotonic()
        if began < due:
            return
        if shown is None:
            shown = ipython.display.display(view, display_id=True)
        else:
            shown.update(view)
        took = time.monotonic() - began
        due = began + took + max(EVERY, SHARE * took)

    try:
        yield draw
    finally:
        if shown is not None:
            shown.update(view)


def _picture(run: Run) -> str | None:
    """The curves as a data address; None where there is nothing to draw, or nothing to draw with."""
    if not is_installed("matplotlib"):
        return None
    from cagsr.runs.curves import training_curves

    png = training_curves(run.metrics, run.label)
    return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _newest(run: Run) -> list[dict[str, Any]]:
    """The newest answers, those to held-out prompts first, each with its prompt and what the start had said."""
    found = answers_of(run, CHARACTERS)
    newest = sorted(found["rows"], key=lambda row: (not row["held_out"], -row["step"]))[:ANSWERS]
    return [row | {"prompt": found["prompts"][row["prompt"]]} for row in newest]
