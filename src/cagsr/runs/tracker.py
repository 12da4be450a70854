"""Send metrics to TensorBoard, Weights & Biases or Trackio, through accelerate's own trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from cagsr.atomic import disk_errors
from cagsr.errors import ConfigError

TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]

_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""For each tracker the modules of which one must be there."""


class Tracker(Protocol):
    """Where metrics go besides the run folder."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""

    def finish(self) -> None:
        """Send what is left and close."""


class _NoTracker:
    """tracker: none."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class _AccelerateTracker:
    """One of accelerate's trackers; on other processes than the main one it does nothing by itself."""

    def __init__(self, tracker: GeneralTracker) -> None:
        self._tracker = tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        self._tracker.log({name: float(value) for name, value in metrics.items() if value is not None}, step=step)

    def finish(self) -> None:
        """Send what is left and close."""
        self._tracker.finish()


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Flatten settings to ``section.key`` with values every tracker takes (lists and None become text)."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flat_settings(value, name))
        else:
            flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def check_tracker(name: TrackerName) -> None:
    """See that a tracker's package is there, before any model is loaded.

    Raises:
        ConfigError: it is not; the message says what to install.
    """
    packages = _PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ConfigError(f'run.tracker is {name} but its package is not installed: pip install "cagsr[{name}]".')


def start_tracker(name: TrackerName, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Start a tracker for a run.

    TensorBoard and Weights & Biases write to ``folder/trackers``; Weights & Biases and Trackio name the run after
    ``folder`` in the project ``cagsr``.

    Args:
        name: which one; ``none`` gives a tracker that does nothing.
        folder: the run folder.
        config: the resolved settings, nested.

    Raises:
        ConfigError: the package is not installed.
    """
    check_tracker(name)
    if name == "none":
        return _NoTracker()
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
    return _AccelerateTracker(tracker)
