"""From reward to advantages: penalties, estimators, whitening, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cagsr.advantage.estimate import estimate_advantages
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError
from cagsr.flow import Advantages, EpisodeBatch, Reward, RewardBatch, Scores

MakeBatch = Callable[..., RewardBatch]
PLAIN = PPOConfig(whiten_advantages=False, missing_eos_penalty=None, gamma=1.0, lam=1.0)


def reward_of(totals: Tensor, mask: Tensor) -> Reward:
    """A reward that is paid at the last real token."""
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask
    return Reward(total=totals, per_token=last * totals[:, None], terms={}, contributions={})


def setup(batch: RewardBatch) -> tuple[Reward, EpisodeBatch, Scores, Tensor]:
    assert batch.reference_logprobs is not None
    totals = torch.randn(len(batch.episodes.ended), generator=torch.Generator().manual_seed(5))
    return reward_of(totals, batch.episodes.sampled), batch.rollout, batch.scores, batch.reference_logprobs


def test_returns_hold_reward_penalty_and_kl(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch())
    mask = rollout.sampled
    config = replace(PLAIN, missing_eos_penalty=3.0)
    result = estimate_advantages(config, reward, rollout, scores, reference, 0.5)
    kl = ((scores.logprobs - reference) * mask).sum(1)
    expected = reward.total - 3.0 * ~rollout.ended - 0.5 * kl
    torch.testing.assert_close(result.returns[:, 0], expected, atol=1e-5, rtol=0)
    # gamma = lambda = 1: the return of the last token has only its own KL.
    last = mask.sum(1, keepdim=True) - 1
    expected = reward.total - 3.0 * ~rollout.ended - 0.5 * (scores.logprobs - reference).gather(1, last)[:, 0]
    torch.testing.assert_close(result.returns.gather(1, last)[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        result.advantages[mask], (result.returns - scores.values)[mask], atol=1e-5, rtol=0  # type: ignore[operator]
    )  # fmt: skip
    assert (result.advantages[~mask] == 0).all()


def test_kl_in_the_loss_leaves_the_reward_alone(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch())
    result = estimate_advantages(replace(PLAIN, kl_in="loss"), reward, rollout, scores, reference, 0.5)
    torch.testing.assert_close(result.returns[:, 0], reward.total, atol=1e-5, rtol=0)


def test_k3_is_charged_when_chosen(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch())
    result = estimate_advantages(replace(PLAIN, kl_estimator="k3"), reward, rollout, scores, reference, 1.0)
    ratio = reference - scores.logprobs
    k3 = ((ratio.exp() - 1 - ratio) * rollout.sampled).sum(1)
    torch.testing.assert_close(result.returns[:, 0], reward.total - k3, atol=1e-5, rtol=0)


def test_rloo_by_hand(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=3)
    _, rollout, scores, reference = setup(batch)
    reward = reward_of(torch.tensor([1.0, 2.0, 6.0]), rollout.sampled)
    config = replace(PLAIN, estimator="rloo")
    result = estimate_advantages(config, reward, rollout, replace(scores, values=None), reference, 0.0)
    expected = torch.tensor([-3.0, -1.5, 4.5])[:, None] * rollout.sampled
    torch.testing.assert_close(result.advantages, expected)
    assert (result.returns == 0).all()
    # With the unit scale one factor for all: order and zeros stay.
    scaled = estimate_advantages(replace(config, whiten_advantages=True), reward, rollout, scores, reference, 0.0)
    std = expected[rollout.sampled].std()
    torch.testing.assert_close(scaled.advantages, expected / std, atol=1e-5, rtol=0)


def test_group_estimators_charge_kl_and_penalty_to_the_sum(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch(prompts=1, generations=2))
    rollout = replace(rollout, ended=torch.tensor([True, False]))
    config = replace(PLAIN, estimator="rloo", missing_eos_penalty=1.5)
    result = estimate_advantages(config, reward, rollout, scores, reference, 0.3)
    sums = reward.total - torch.tensor([0.0, 1.5])
    sums = sums - 0.3 * ((scores.logprobs - reference) * rollout.sampled).sum(1)
    assert float(result.advantages[0, 0]) == pytest.approx(float(sums[0] - sums[1]), abs=1e-5)


def test_a_group_of_equals_is_not_pushed(make_reward_batch: MakeBatch) -> None:
    _, rollout, scores, reference = setup(make_reward_batch(prompts=2, generations=3))
    reward = reward_of(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 9.0]), rollout.sampled)
    for estimator in ("rloo", "grpo"):
        config = PPOConfig(estimator=estimator, missing_eos_penalty=None)  # type: ignore[arg-type]
        result = estimate_advantages(config, reward, rollout, scores, reference, 0.0)
        assert (result.advantages[:3].abs() < 1e-4).all()
        assert float(result.advantages[5, 0]) > 0.5


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_padding_changes_nothing(make_reward_batch: MakeBatch, estimator: str, whiten_rewards: bool) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch(prompts=3))
    config = PPOConfig(estimator=estimator, whiten_rewards=whiten_rewards)  # type: ignore[arg-type]

    def pad(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, torch.full((x.shape[0], 3), value).to(x.dtype)], dim=1)

    plain = estimate_advantages(config, reward, rollout, scores, reference, 0.1)
    assert scores.values is not None
    wide = estimate_advantages(
        config,
        replace(reward, per_token=pad(reward.per_token, float("nan"))),
        replace(rollout, response_mask=pad(rollout.sampled, 0)),
        replace(scores, logprobs=pad(scores.logprobs, float("-inf")), values=pad(scores.values, float("nan"))),
        pad(reference, float("-inf")),
        0.1,
    )
    torch.testing.assert_close(wide.advantages[:, :-3], plain.advantages, atol=1e-5, rtol=0)
    torch.testing.assert_close(wide.returns[:, :-3], plain.returns, atol=1e-5, rtol=0)
    assert (wide.advantages[:, -3:] == 0).all()


def test_gae_is_whitened_over_response_tokens(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch(prompts=3))
    advantages = estimate_advantages(PPOConfig(), reward, rollout, scores, reference, 0.1).advantages
    real = advantages[rollout.sampled]
    assert float(real.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(real.std()) == pytest.approx(1.0, abs=1e-4)


def test_nothing_carries_a_gradient(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch())
    logprobs = scores.logprobs.clone().requires_grad_()
    values = scores.values.clone().requires_grad_()  # type: ignore[union-attr]
    for estimator in ("gae", "grpo"):
        config = PPOConfig(estimator=estimator)  # type: ignore[arg-type]
        result: Advantages = estimate_advantages(
            config, reward, rollout, replace(scores, logprobs=logprobs, values=values), reference, 0.1
        )
        assert not result.advantages.requires_grad
        assert not result.returns.requires_grad


def test_what_is_missing_is_named(make_reward_batch: MakeBatch) -> None:
    reward, rollout, scores, reference = setup(make_reward_batch(prompts=3, generations=1))
    with pytest.raises(ConfigError, match="value head"):
        estimate_advantages(PPOConfig(), reward, rollout, replace(scores, values=None), reference, 0.1)
    with pytest.raises(ConfigError, match="num_generations"):
        estimate_advantages(PPOConfig(estimator="rloo"), reward, rollout, scores, reference, 0.1)


def test_an_empty_answer_still_counts_in_its_group(make_reward_batch: MakeBatch) -> None:
    _, rollout, scores, reference = setup(make_reward_batch(prompts=1, generations=2))
    mask = rollout.sampled.clone()
    mask[1] = False
    reward = reward_of(torch.tensor([1.0, -3.0]), mask)
    config = replace(PLAIN, estimator="rloo")
    result = estimate_advantages(config, reward, replace(rollout, response_mask=mask), scores, reference, 0.0)
    assert float(result.advantages[0, 0]) == pytest.approx(4.0)
    assert (result.advantages[1] == 0).all()
