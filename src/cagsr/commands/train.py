"""``cagsr train``: PPO on unlabelled prompts with the reward read from the model's own attention."""

from __future__ import annotations

from cagsr.config import TrainConfig as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Train and leave the run in ``config.output_dir``."""
    from cagsr.train import train

    train(config)
