"""PPO's losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cagsr.update.losses import explained_variance, masked_sum_loss, policy_loss, value_loss

MASK = torch.tensor([[True, True, False]])


def test_policy_loss_takes_the_worse_of_plain_and_clipped():
    old = torch.zeros(1, 3)
    new = torch.tensor([[math.log(1.5), math.log(0.5), math.log(9.0)]])
    advantages = torch.tensor([[1.0, -1.0, 100.0]])
    # token 1: max(-1.5, -1.2) = -1.2 (clipped); token 2: max(0.5, 0.8) = 0.8 (clipped); token 3 is padding
    found = policy_loss(new, old, advantages, MASK, torch.tensor(2.0), 0.2)
    assert float(found.loss) == pytest.approx((-1.2 + 0.8) / 2)
    assert int(found.clipped) == 2
    expected_kl = (1.5 - 1 - math.log(1.5)) + (0.5 - 1 - math.log(0.5))
    assert float(found.approx_kl) == pytest.approx(expected_kl, abs=1e-6)


def test_policy_loss_unclipped_side_has_the_plain_gradient():
    new = torch.tensor([[math.log(0.5), 0.0, 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 0.0, 0.0]])
    # a good token that became less likely must still be pushed up: max(-0.5, -0.8) = -0.5, gradient -0.5
    policy_loss(new, torch.zeros(1, 3), advantages, MASK, torch.tensor(1.0), 0.2).loss.backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([-0.5, 0.0, 0.0])


def test_policy_loss_weighs_tokens_by_the_sampling_correction():
    advantages = torch.tensor([[1.0, 3.0, 0.0]])
    correction = torch.tensor([[math.log(0.5), 0.0, 0.0]])
    found = policy_loss(torch.zeros(1, 3), torch.zeros(1, 3), advantages, MASK, torch.tensor(2.0), 0.2, correction)
    assert float(found.loss) == pytest.approx(-(0.5 * 1 + 3) / 2)


def test_log_ratio_is_clamped_before_exp():
    new = torch.tensor([[1e4, 0.0, 0.0]])
    found = policy_loss(new, torch.zeros(1, 3), torch.ones(1, 3), MASK, torch.tensor(2.0), 0.2)
    assert torch.isfinite(found.loss)
    assert torch.isfinite(found.ratio).all()


def test_value_loss_is_half_the_larger_squared_error():
    values, old = torch.tensor([[1.0, 0.1, 5.0]]), torch.zeros(1, 3)
    returns = torch.tensor([[1.0, 1.0, 0.0]])
    # token 1: clipped to 0.2: max(0, 0.64); token 2: inside the range: 0.81
    assert float(value_loss(values, old, returns, MASK, torch.tensor(2.0), 0.2)) == pytest.approx((0.64 + 0.81) / 4)


def test_masked_sum_ignores_padding_even_where_it_is_not_finite():
    per_token = torch.tensor([[1.0, 2.0, float("nan")]])
    assert float(masked_sum_loss(per_token, MASK, torch.tensor(4.0))) == pytest.approx(0.75)


def test_explained_variance():
    returns = torch.tensor([[1.0, 3.0, 9.0]])
    assert explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 3), returns, MASK) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([[3.0, 1.0, 0.0]]), returns, MASK) == pytest.approx(-3.0)
