"""``cagsr dpo``: train on preference pairs without a reward model and without sampling."""

from __future__ import annotations

from cagsr.config import DpoConfig as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Train and leave the model in ``config.output_dir``."""
    from cagsr.preferences.dpo import train_dpo

    train_dpo(config)
