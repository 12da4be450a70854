"""cagsr: reinforcement learning for language models whose reward comes from the model's own attention.

The names below are the library's public face; each is imported when it is first asked for, so ``import cagsr`` itself
loads neither torch nor transformers. Training is ``cagsr.train.train(config)``: the function is not repeated here, because
a function and a module can't both be called ``cagsr.train``.

By module: `cagsr.train`, `cagsr.config`, `cagsr.flow`, `cagsr.errors`, `cagsr.attention`, `cagsr.reward`, `cagsr.view`,
`cagsr.notebook`, `cagsr.integrations`.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cagsr.attention import AttentionRegion, PromptAttentionReader, Reading
    from cagsr.config import *
    from cagsr.errors import CagsrError
    from cagsr.flow import RewardBatch
    from cagsr.reward.term import PartialValues, RewardTerm

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "AttentionRegion",
    "CagsrError",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "PPOConfig",
    "PartialValues",
    "PromptAttentionReader",
    "Reading",
    "RewardBatch",
    "RewardConfig",
    "RewardTerm",
    "RunConfig",
    "SalienceConfig",
    "SamplingConfig",
    "SftConfig",
    "TrainConfig",
    "__version__",
]

_PLACES = ("cagsr.errors", "cagsr.config", "cagsr.flow", "cagsr.attention", "cagsr.reward.term")
"""Where these names live, those that need no torch first."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    modules = (importlib.import_module(place) for place in _PLACES if name in __all__)
    module = next((one for one in modules if hasattr(one, name)), None)
    if module is None:
        raise AttributeError(f"module 'cagsr' has no attribute {name!r}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
