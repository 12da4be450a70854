"""Every setting of every command, as typed dataclasses with a line under each field.

The command line shows these lines as help, the run folder stores the resolved values as ``config.yaml``. Names follow
TRL where TRL has the setting. Each states with its type what it allows; ``validate`` holds a config to that. Settings of a
reward's terms stand with the terms (``reward/terms/``), and what has a reward among its settings imports torch with them; the
others do not: they are imported when they are asked for.
"""

# ruff: noqa: F403
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cagsr.config.episodes import *
    from cagsr.config.trainers import *
    from cagsr.config.training import *
    from cagsr.config.validation import validate as validate
    from cagsr.reward.settings import *
    from cagsr.reward.terms.associated_coverage import AssociatedCoverageConfig as AssociatedCoverageConfig
    from cagsr.reward.terms.copy_coverage import CopyCoverageConfig as CopyCoverageConfig
    from cagsr.reward.terms.coverage import CoverageConfig as CoverageConfig
    from cagsr.reward.terms.focus import FocusConfig as FocusConfig
    from cagsr.reward.terms.grounded_coverage import GroundedCoverageConfig as GroundedCoverageConfig
    from cagsr.reward.terms.history_repetition import HistoryRepetitionConfig as HistoryRepetitionConfig
    from cagsr.reward.terms.length import LengthConfig as LengthConfig
    from cagsr.reward.terms.mean_mass import MeanMassConfig as MeanMassConfig
    from cagsr.reward.terms.repetition import RepetitionConfig as RepetitionConfig
    from cagsr.reward.terms.self_certainty import SelfCertaintyConfig as SelfCertaintyConfig
    from cagsr.reward.terms.unsupported import UnsupportedConfig as UnsupportedConfig
    from cagsr.training.settings import TrainConfig as TrainConfig

_PLACES = (
    *("cagsr.config.validation", "cagsr.config.training", "cagsr.config.episodes", "cagsr.config.trainers"),
    *("cagsr.training.settings", "cagsr.reward.settings"),
)
"""Where the names of this package are, those that need no torch first."""


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    for place in _PLACES:
        module = importlib.import_module(place)
        if name in vars(module):
            return vars(module)[name]
    for term in module.TERMS:
        if term.config.__name__ == name:
            return term.config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
