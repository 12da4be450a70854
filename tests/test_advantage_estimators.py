"""GAE, the group estimators, whitening and the KL against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cagsr.advantage.gae import generalized_advantages
from cagsr.advantage.group import group_z_scores, leave_one_out
from cagsr.advantage.kl import KLController, kl_k1, kl_k3
from cagsr.advantage.whiten import masked_moments, unit_scale, whiten
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError

T, F = True, False


def close(actual: Tensor, expected: list, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=tolerance, rtol=0)


def test_gae_on_three_tokens_by_hand() -> None:
    # gamma 0.9, lambda 0.5, rewards 1 0 2, values 0.5 1 1.5:
    # delta = 1 + 0.9 * 1 - 0.5 = 1.4;  0 + 0.9 * 1.5 - 1 = 0.35;  2 - 1.5 = 0.5
    # A_2 = 0.5;  A_1 = 0.35 + 0.45 * 0.5 = 0.575;  A_0 = 1.4 + 0.45 * 0.575 = 1.65875
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    mask = torch.tensor([[T, T, T]])
    advantages, returns = generalized_advantages(rewards, values, mask, 0.9, 0.5)
    close(advantages, [[1.65875, 0.575, 0.5]])
    close(returns, [[2.15875, 1.575, 2.0]])


def test_gae_skips_masked_tokens() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0, 2.0, nan], [nan] * 5])
    values = torch.tensor([[0.5, nan, 1.0, 1.5, nan], [nan] * 5])
    mask = torch.tensor([[T, F, T, T, F], [F] * 5])
    advantages, returns = generalized_advantages(rewards, values, mask, 0.9, 0.5)
    close(advantages, [[1.65875, 0.0, 0.575, 0.5, 0.0], [0.0] * 5])
    close(returns, [[2.15875, 0.0, 1.575, 2.0, 0.0], [0.0] * 5])


def test_gae_with_gamma_and_lambda_one_is_return_minus_value() -> None:
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    advantages, returns = generalized_advantages(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages, to_go - values, atol=1e-5, rtol=0)


def test_leave_one_out_by_hand_in_any_order_and_size() -> None:
    # Group 4: 1, 2, 6 -> 1 - 4, 2 - 3.5, 6 - 1.5. Group 9: 5, 7 -> -2, 2.
    rewards = torch.tensor([1.0, 5.0, 2.0, 7.0, 6.0])
    close(leave_one_out(rewards, torch.tensor([4, 9, 4, 9, 4])), [-3.0, -2.0, -1.5, 2.0, 4.5])


def test_rloo_refuses_a_group_of_one() -> None:
    with pytest.raises(ConfigError, match=r"num_generations"):
        leave_one_out(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_group_z_scores_by_hand() -> None:
    # Group 0: 1, 3 -> mean 2, sample deviation sqrt(2). Group 1 is alone, group 2 has no spread.
    rewards = torch.tensor([1.0, 3.0, 8.0, 5.0, 5.0])
    scores = group_z_scores(rewards, torch.tensor([0, 0, 1, 2, 2]))
    z = 1 / (math.sqrt(2) + 1e-4)
    close(scores, [-z, z, 0.0, 0.0, 0.0])


def test_group_z_scores_train_on_no_rounding() -> None:
    # Group 0 differs in the last bit of float32, group 1 by a thousandth: 0.001 / sqrt(2) / (0.001 / sqrt(2) + 1e-4).
    rewards = torch.tensor([3.0, 3.0 + 2.4e-7, 0.0, 0.001])
    assert rewards[0] != rewards[1]
    scores = group_z_scores(rewards, torch.tensor([0, 0, 1, 1]))
    z = 0.0005 / (0.001 / math.sqrt(2) + 1e-4)
    close(scores, [0.0, 0.0, -z, z])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_group_estimators_follow_a_permutation_and_sum_to_zero(seed: int, groups: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    rewards = torch.randn(len(group), generator=generator)
    order = torch.randperm(len(group), generator=generator)
    for estimator in (leave_one_out, group_z_scores):
        plain = estimator(rewards, group)
        torch.testing.assert_close(estimator(rewards[order], group[order]), plain[order], atol=1e-5, rtol=0)
        for number in range(len(groups)):
            assert abs(float(plain[group == number].sum())) < 1e-3


def test_whiten_by_hand() -> None:
    # 1, 2, 3: mean 2, sample variance 1. The 100s are padding.
    values = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
    mask = torch.tensor([[T, T, F], [T, F, F]])
    close(whiten(values, mask), [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    close(whiten(2 * values, mask, shift_mean=False), [[3.0, 4.0, 0.0], [5.0, 0.0, 0.0]])
    close(unit_scale(2 * values, mask), [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])


def test_whitening_tiny_batches_is_finite() -> None:
    one = torch.tensor([[2.0, math.nan]])
    mask = torch.tensor([[T, F]])
    close(whiten(one, mask), [[2.0, 0.0]])
    close(whiten(one, torch.tensor([[F, F]])), [[0.0, 0.0]])
    close(whiten(torch.full((1, 3), 4.0), torch.ones(1, 3, dtype=torch.bool)), [[0.0] * 3])
    close(unit_scale(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)), [[0.0] * 3])


def test_whitening_over_processes_equals_one_process() -> None:
    values, mask = torch.randn(4, 5) + 3, torch.rand(4, 5) > 0.3
    whole = whiten(values, mask)
    # Two processes with two rows each: answer each reduction of one with the sum of both, recorded beforehand.
    moments = masked_moments(values, mask)
    local = masked_moments(values[:2], mask[:2])
    answers = iter(
        [
            torch.tensor([moments[0], moments[0] * moments[1]], dtype=torch.float64),
            torch.tensor([moments[2] * (moments[0] - 1)], dtype=torch.float64),
        ]
    )
    assert local[0] != moments[0]
    torch.testing.assert_close(whiten(values[:2], mask[:2], reduce=lambda _: next(answers)), whole[:2])


def test_kl_estimators_by_hand() -> None:
    policy, reference = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([-1.5, -1.0, -500.0])
    close(kl_k1(policy, reference), [0.5, -1.0, 20.0])
    close(kl_k3(policy, reference), [math.exp(-0.5) - 0.5, math.e - 2, math.exp(-20) + 19])
    assert torch.isfinite(kl_k3(reference, policy)).all()


def test_kl_estimators_agree_in_expectation() -> None:
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((p * estimator(p.log(), q.log())).sum(), exact)


def test_adaptive_kl_by_hand() -> None:
    config = PPOConfig(kl_coef=0.1, kl_controller="adaptive", target_kl=4.0, horizon=1000)
    controller = KLController.build(config)
    assert controller.update(4.4, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert controller.update(1000.0, 100) == pytest.approx(0.101 * 1.02)  # clipped to 0.2
    assert controller.update(-5.0, 100) == pytest.approx(0.101 * 1.02 * 0.98)
    other = KLController.build(config)
    other.load_state_dict(controller.state_dict())
    assert other.kl_coef == controller.kl_coef


def test_fixed_kl_stays() -> None:
    controller = KLController.build(PPOConfig(kl_coef=0.05))
    assert controller.update(100.0, 64) == 0.05
