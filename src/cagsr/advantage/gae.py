"""Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438, equations 11 and 16)."""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    turn: Tensor | None = None,
    turn_discount: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantages + values), ``(batch, response)`` float32, 0 on masked tokens; backwards over real
    ones.

    ``delta_t = r_t + gamma V_{t'} - V_t`` and ``A_t = delta_t + gamma lam A_{t'}``, where t' is the next real token and
    both are 0 after the last one (an answer ends there, whether by a stop token or cut). Masked tokens are skipped as if
    they were not there: neither their rewards nor their values are read. ``lam`` 0 is one-step TD, 1 is Monte Carlo.

    All ``(batch, response)``: the reward that follows each token, the value estimate before it, whether it is real, and the
    ``turn`` it was said in: where t' is of a later turn than t, gamma is multiplied by ``turn_discount`` for each turn between
    them, so that with lam 1 and gamma 1 turn t's answer is trained towards ``sum_{u >= t} turn_discount^(u - t) R(u)``
    (arXiv 2506.11108).
    """
    rewards = torch.where(mask, rewards.float(), 0.0)
    values = torch.where(mask, values.float(), 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, :1].sum(dim=1))
    next_advantage = torch.zeros_like(next_value)
    turns = torch.zeros_like(mask, dtype=torch.long) if turn is None else turn
    next_turn = turns.new_zeros(len(turns))
    for t in range(rewards.shape[1] - 1, -1, -1):
        real = mask[:, t]
        discount = gamma * turn_discount ** (next_turn - turns[:, t]).clamp(min=0)
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * lam * next_advantage
        advantages[:, t] = torch.where(real, advantage, 0.0)
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        next_turn = torch.where(real, turns[:, t], next_turn)
    return advantages, advantages + values
