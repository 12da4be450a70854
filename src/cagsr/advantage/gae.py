"""Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438, equations 11 and 16)."""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantages + values), ``(batch, response)`` float32, 0 on masked tokens; backwards over real
    ones.

    ``delta_t = r_t + gamma V_{t'} - V_t`` and ``A_t = delta_t + gamma lam A_{t'}``, where t' is the next real token and
    both are 0 after the last one (an answer ends there, whether by a stop token or cut). Masked tokens are skipped as if
    they were not there: neither their rewards nor their values are read. ``lam`` 0 is one-step TD, 1 is Monte Carlo.

    All ``(batch, response)``: the reward that follows each token, the value estimate before it, and whether it is real.
    """
    rewards = torch.where(mask, rewards.float(), 0.0)
    values = torch.where(mask, values.float(), 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, :1].sum(dim=1))
    next_advantage = torch.zeros_like(next_value)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        real = mask[:, t]
        advantages[:, t] = torch.where(real, advantage, 0.0)
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
    return advantages, advantages + values
