"""What the verl and the OpenRLHF example share: settings in a file, and a reward function imported by its path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import yaml


def write_settings(folder: Path, model: Path, prompts: Path) -> Path:
    """Write the YAML file that the environment variable CAGSR_REWARD_CONFIG names."""
    settings = {
        "model": {"path": str(model)},
        "data": {"path": str(prompts)},
        # One answer at a time: raw values, which the trainer's estimator scales.
        "reward": {"normalize": "none", "grounded_coverage": {"weight": 1.0}, "repetition": {"weight": -0.3}},
    }
    file = folder / "reward.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def import_file(module: str) -> ModuleType:
    """Import a module from its file, as verl and OpenRLHF do with the path that they are given."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location("reward_func", found.origin)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
