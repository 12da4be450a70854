"""``cagsr reward-model``: a reward model from preference pairs, for ``cagsr train --reward.models``."""

from __future__ import annotations

from cagsr.config import RewardModelConfig as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Train, measure and leave the reward model in ``config.output_dir``."""
    from cagsr.preferences.reward_trainer import train_reward_model

    train_reward_model(config)
