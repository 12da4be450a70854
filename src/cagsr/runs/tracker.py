"""Send metrics to TensorBoard, Weights & Biases or Trackio, through accelerate's own trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from cagsr.errors import ConfigError
from cagsr.runs.folder import flat_tree
from cagsr.support.atomic import disk_errors

TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""For each tracker the modules of which one must be there."""


def flat_settings(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Nested settings as ``section.key`` with values every tracker takes (lists and None become text)."""
    return {
        key: value if isinstance(value, str | int | float) else str(value) for key, value in flat_tree(config).items()
    }


def check_tracker(name: TrackerName) -> None:
    """See that a tracker's package is there, before any model is loaded; ConfigError with what to install if it is not."""
    packages = _PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ConfigError(f'run.tracker is {name} but its package is not installed: pip install "cagsr[{name}]".')


def start_tracker(name: TrackerName, folder: Path, config: Mapping[str, Any]) -> GeneralTracker | None:
    """Start a tracker for a run that ``check_tracker`` has passed, with its nested settings; ``none`` gives None.

    TensorBoard and Weights & Biases write to ``folder/trackers``; Weights & Biases and Trackio name the run after
    ``folder`` in the project ``cagsr``.
    """
    if name == "none":
        return None
    PartialState()  # accelerate's trackers ask it whether they run on the main process
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker(folder.name, logging_dir=folder / "trackers")
    elif name == "wandb":
        with disk_errors(folder / "trackers"):
            (folder / "trackers").mkdir(parents=True, exist_ok=True)
        tracker = WandBTracker("cagsr", name=folder.name, dir=str(folder / "trackers"))
    else:
        tracker = TrackioTracker("cagsr", name=folder.name)
    tracker.start()
    tracker.store_init_configuration(flat_settings(config))
    return tracker
