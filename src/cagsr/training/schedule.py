"""How the learning rate moves over a run."""

from __future__ import annotations

import math

from cagsr.config import PPOConfig


def learning_rate_factor(step: int, ppo: PPOConfig, steps: int) -> float:
    """What the learning rates are multiplied by at a step.

    Args:
        step: updates done, from 0.
        ppo: ``warmup_steps`` of a linear rise, then ``lr_scheduler``: constant, linear or cosine to 0.
        steps: updates of the whole run.

    Returns:
        A factor in [0, 1].
    """
    if step < ppo.warmup_steps:
        return (step + 1) / (ppo.warmup_steps + 1)
    progress = (step - ppo.warmup_steps) / max(1, steps - ppo.warmup_steps)
    if ppo.lr_scheduler == "linear":
        return max(0.0, 1.0 - progress)
    if ppo.lr_scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
