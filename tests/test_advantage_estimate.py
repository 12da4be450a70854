"""From returns to targets: penalties, estimators, whitening, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cagsr.advantage.estimate import estimate_targets
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError
from cagsr.flow import EpisodeBatch, Prompt, PromptBatch, Readings, Returns, RewardBatch, Targets

MakeBatch = Callable[..., RewardBatch]
PLAIN = PPOConfig(whiten_advantages=False, missing_eos_penalty=None, gamma=1.0, lam=1.0)


def returns_of(totals: Tensor, mask: Tensor) -> Returns:
    """A reward that is paid at the last real token."""
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask
    return Returns(totals, last * totals[:, None], totals[:, None], terms={}, contributions={})


def setup(batch: RewardBatch) -> tuple[Returns, EpisodeBatch, Readings, Tensor]:
    assert batch.reference_logprobs is not None
    totals = torch.randn(len(batch.episodes.ended), generator=torch.Generator().manual_seed(5))
    return returns_of(totals, batch.episodes.sampled), batch.episodes, batch.readings, batch.reference_logprobs


def sampled_as(episodes: EpisodeBatch, mask: Tensor) -> EpisodeBatch:
    """Other lengths of the same answers."""
    turn = torch.zeros(mask.shape, dtype=torch.long)
    return replace(episodes, real=mask, sampled=mask, turn=turn)


def test_returns_hold_reward_penalty_and_kl(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch())
    mask = episodes.sampled
    config = replace(PLAIN, missing_eos_penalty=3.0)
    result = estimate_targets(config, given, episodes, readings, reference, 0.5)
    kl = ((readings.logprobs - reference) * mask).sum(1)
    expected = given.total - 3.0 * ~episodes.ended - 0.5 * kl
    torch.testing.assert_close(result.returns[:, 0], expected, atol=1e-5, rtol=0)
    # gamma = lambda = 1: the return of the last token has only its own KL.
    last = mask.sum(1, keepdim=True) - 1
    expected = given.total - 3.0 * ~episodes.ended - 0.5 * (readings.logprobs - reference).gather(1, last)[:, 0]
    torch.testing.assert_close(result.returns.gather(1, last)[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        result.advantages[mask], (result.returns - readings.values)[mask], atol=1e-5, rtol=0  # type: ignore[operator]
    )  # fmt: skip
    assert (result.advantages[~mask] == 0).all()


def test_kl_in_the_loss_leaves_the_reward_alone(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch())
    result = estimate_targets(replace(PLAIN, kl_in="loss"), given, episodes, readings, reference, 0.5)
    torch.testing.assert_close(result.returns[:, 0], given.total, atol=1e-5, rtol=0)


def test_k3_is_charged_when_chosen(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch())
    result = estimate_targets(replace(PLAIN, kl_estimator="k3"), given, episodes, readings, reference, 1.0)
    ratio = reference - readings.logprobs
    k3 = ((ratio.exp() - 1 - ratio) * episodes.sampled).sum(1)
    torch.testing.assert_close(result.returns[:, 0], given.total - k3, atol=1e-5, rtol=0)


def test_rloo_by_hand(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=3)
    _, episodes, readings, reference = setup(batch)
    given = returns_of(torch.tensor([1.0, 2.0, 6.0]), episodes.sampled)
    config = replace(PLAIN, estimator="rloo")
    result = estimate_targets(config, given, episodes, replace(readings, values=None), reference, 0.0)
    expected = torch.tensor([-3.0, -1.5, 4.5])[:, None] * episodes.sampled
    torch.testing.assert_close(result.advantages, expected)
    assert (result.returns == 0).all()
    # With the unit scale one factor for all: order and zeros stay.
    scaled = estimate_targets(replace(config, whiten_advantages=True), given, episodes, readings, reference, 0.0)
    std = expected[episodes.sampled].std()
    torch.testing.assert_close(scaled.advantages, expected / std, atol=1e-5, rtol=0)


def test_group_estimators_charge_kl_and_penalty_to_the_sum(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch(prompts=1, generations=2))
    episodes = replace(episodes, ended=torch.tensor([True, False]))
    config = replace(PLAIN, estimator="rloo", missing_eos_penalty=1.5)
    result = estimate_targets(config, given, episodes, readings, reference, 0.3)
    sums = given.total - torch.tensor([0.0, 1.5])
    sums = sums - 0.3 * ((readings.logprobs - reference) * episodes.sampled).sum(1)
    assert float(result.advantages[0, 0]) == pytest.approx(float(sums[0] - sums[1]), abs=1e-5)


def test_a_group_of_equals_is_not_pushed(make_reward_batch: MakeBatch) -> None:
    _, episodes, readings, reference = setup(make_reward_batch(prompts=2, generations=3))
    given = returns_of(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 9.0]), episodes.sampled)
    for estimator in ("rloo", "grpo"):
        config = PPOConfig(estimator=estimator, missing_eos_penalty=None)  # type: ignore[arg-type]
        result = estimate_targets(config, given, episodes, readings, reference, 0.0)
        assert (result.advantages[:3].abs() < 1e-4).all()
        assert float(result.advantages[5, 0]) > 0.5


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_padding_changes_nothing(make_reward_batch: MakeBatch, estimator: str, whiten_rewards: bool) -> None:
    given, episodes, readings, reference = setup(make_reward_batch(prompts=3))
    config = PPOConfig(estimator=estimator, whiten_rewards=whiten_rewards)  # type: ignore[arg-type]

    def pad(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, torch.full((x.shape[0], 3), value).to(x.dtype)], dim=1)

    plain = estimate_targets(config, given, episodes, readings, reference, 0.1)
    assert readings.values is not None
    wide = estimate_targets(
        config,
        replace(given, per_token=pad(given.per_token, float("nan"))),
        sampled_as(episodes, pad(episodes.sampled, 0)),
        replace(readings, logprobs=pad(readings.logprobs, float("-inf")), values=pad(readings.values, float("nan"))),
        pad(reference, float("-inf")),
        0.1,
    )
    torch.testing.assert_close(wide.advantages[:, :-3], plain.advantages, atol=1e-5, rtol=0)
    torch.testing.assert_close(wide.returns[:, :-3], plain.returns, atol=1e-5, rtol=0)
    assert (wide.advantages[:, -3:] == 0).all()


def test_gae_is_whitened_over_response_tokens(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch(prompts=3))
    advantages = estimate_targets(PPOConfig(), given, episodes, readings, reference, 0.1).advantages
    real = advantages[episodes.sampled]
    assert float(real.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(real.std()) == pytest.approx(1.0, abs=1e-4)


def test_nothing_carries_a_gradient(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch())
    logprobs = readings.logprobs.clone().requires_grad_()
    values = readings.values.clone().requires_grad_()  # type: ignore[union-attr]
    for estimator in ("gae", "grpo"):
        config = PPOConfig(estimator=estimator)  # type: ignore[arg-type]
        result: Targets = estimate_targets(
            config, given, episodes, replace(readings, logprobs=logprobs, values=values), reference, 0.1
        )
        assert not result.advantages.requires_grad
        assert not result.returns.requires_grad


def test_what_is_missing_is_named(make_reward_batch: MakeBatch) -> None:
    given, episodes, readings, reference = setup(make_reward_batch(prompts=3, generations=1))
    with pytest.raises(ConfigError, match="value head"):
        estimate_targets(PPOConfig(), given, episodes, replace(readings, values=None), reference, 0.1)
    with pytest.raises(ConfigError, match="num_generations"):
        estimate_targets(PPOConfig(estimator="rloo"), given, episodes, readings, reference, 0.1)


def test_an_empty_answer_still_counts_in_its_group(make_reward_batch: MakeBatch) -> None:
    _, episodes, readings, reference = setup(make_reward_batch(prompts=1, generations=2))
    mask = episodes.sampled.clone()
    mask[1] = False
    given = returns_of(torch.tensor([1.0, -3.0]), mask)
    config = replace(PLAIN, estimator="rloo")
    result = estimate_targets(config, given, sampled_as(episodes, mask), readings, reference, 0.0)
    assert float(result.advantages[0, 0]) == pytest.approx(4.0)
    assert (result.advantages[1] == 0).all()


def conversations() -> tuple[Returns, EpisodeBatch, Readings, Tensor]:
    """Two prompts with three and two episodes: two tokens, a token that was read, two tokens; or the first two alone.

    Each answer is paid at its last token: (1, 4), (2, 1) and (6) to the first prompt, (1, 7) and (0) to the second.
    """
    turn = torch.tensor([[0, 0, 1, 1, 1]]).repeat(5, 1)
    goes_on = torch.tensor([True, True, False, True, False])[:, None]
    real = (turn == 0) | goes_on
    sampled = real & (torch.arange(5) != 2)
    paid = torch.full((5, 5), float("nan")).masked_fill(
        sampled, 0.0
    )  # what was read pays nothing, whatever stands there
    paid[:, 1] = torch.tensor([1.0, 2.0, 6.0, 1.0, 0.0])
    paid[goes_on[:, 0], 4] = torch.tensor([4.0, 1.0, 7.0])
    by_turn = torch.tensor([[1.0, 4.0], [2.0, 1.0], [6.0, 0.0], [1.0, 7.0], [0.0, 0.0]])
    ids = torch.zeros(5, 5, dtype=torch.long)
    prompts = PromptBatch(
        (Prompt(1, "a"),) * 3 + (Prompt(2, "b"),) * 2,
        torch.ones(5, 1, dtype=torch.long),
        torch.ones(5, 1, dtype=torch.bool),
        torch.zeros(5, 1, dtype=torch.long),
        torch.ones(5, 1),
        torch.tensor([0, 0, 0, 1, 1]),
    )
    episodes = EpisodeBatch(prompts, ids, real, sampled, turn, torch.ones(5, dtype=torch.bool), ("",) * 5)
    zeros = torch.zeros(5, 5)
    return Returns(by_turn.sum(1), paid, by_turn, {}, {}), episodes, Readings(zeros, zeros, zeros, zeros), zeros


def on_answers(first: list[float], second: list[float]) -> Tensor:
    """The same number on both tokens of an answer."""
    one, two = torch.tensor(first), torch.tensor(second)
    return torch.stack([one, one, torch.zeros(5), two, two], dim=1)


def test_rloo_of_two_turns_by_hand() -> None:
    # From the first answer on 5, 3 and 6; 8 and 0. From the second on 4 and 1, and 7, which nothing is compared with.
    result = estimate_targets(replace(PLAIN, estimator="rloo"), *conversations(), 0.0)
    expected = on_answers([5 - 4.5, 3 - 5.5, 6 - 4.0, 8.0, -8.0], [3.0, -3.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(result.advantages, expected)
    assert (result.returns == 0).all()


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_a_later_turn_counts_what_the_discount_leaves_of_it(discount: float) -> None:
    config = replace(PLAIN, estimator="rloo", turn_discount=discount)
    result = estimate_targets(config, *conversations(), 0.0)
    one, two, four = (
        1 + 4 * discount,
        2 + discount,
        1 + 7 * discount,
    )  # from the first answers on; the others' are 6 and 0
    first = [one - (two + 6) / 2, two - (one + 6) / 2, 6 - (one + two) / 2, four, -four]
    torch.testing.assert_close(result.advantages, on_answers(first, [3.0, -3.0, 0.0, 0.0, 0.0]))
    given, episodes, readings, reference = conversations()
    readings = replace(readings, values=torch.zeros(5, 5))
    config = replace(PLAIN, gamma=1.0, lam=1.0, turn_discount=discount)
    result = estimate_targets(config, given, episodes, readings, reference, 0.0)
    torch.testing.assert_close(result.returns, on_answers([one, two, 6.0, four, 0.0], [4.0, 1.0, 0.0, 7.0, 0.0]))


def test_grpo_of_two_turns_by_hand() -> None:
    result = estimate_targets(replace(PLAIN, estimator="grpo"), *conversations(), 0.0)
    std = (7 / 3) ** 0.5  # of 5, 3 and 6; that of 4 and 1 is sqrt(4.5), of 8 and 0 sqrt(32)
    first = [1 / 3 / std, -5 / 3 / std, 4 / 3 / std, 4 / 32**0.5, -4 / 32**0.5]
    expected = on_answers(first, [1.5 / 4.5**0.5, -1.5 / 4.5**0.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(result.advantages, expected, atol=2e-4, rtol=0)


def test_a_turn_bears_the_kl_and_the_penalty_that_come_after_it() -> None:
    given, episodes, readings, reference = conversations()
    logprobs = readings.logprobs.clone()
    logprobs[0, 0], logprobs[1, 3] = (
        1.0,
        2.0,
    )  # nats above the reference: in the first turn of one, the second of another
    logprobs[:, 2] = 50.0  # of what was read, nobody asks
    episodes = replace(episodes, ended=torch.tensor([False, True, True, True, True]))
    config = replace(PLAIN, estimator="rloo", missing_eos_penalty=0.5)
    result = estimate_targets(config, given, episodes, replace(readings, logprobs=logprobs), reference, 0.5)
    # 5 - 0.5 - 0.5, 3 - 1 and 6; then 4 - 0.5 and 1 - 1.
    expected = on_answers([4 - 4.0, 2 - 5.0, 6 - 3.0, 8.0, -8.0], [3.5, -3.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(result.advantages, expected)


def test_gae_goes_over_what_was_read_by_hand() -> None:
    given, episodes, readings, reference = conversations()
    values = torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0]).repeat(5, 1)
    result = estimate_targets(
        replace(PLAIN, gamma=0.5, lam=0.8), given, episodes, replace(readings, values=values), reference, 0.0
    )
    # Backwards: 4 - 4; 0 + 2 - 3, + 0.4 x 0; over the hole 1 + 1.5 - 2, + 0.4 x -1; 0 + 1 - 1, + 0.4 x 0.1.
    torch.testing.assert_close(result.advantages[0], torch.tensor([0.04, 0.1, 0.0, -1.0, 0.0]))
    torch.testing.assert_close(result.returns[0], torch.tensor([1.04, 2.1, 0.0, 2.0, 4.0]))
    # An episode that ends with its first answer: 6 - 2; 0 + 1 - 1, + 0.4 x 4.
    torch.testing.assert_close(result.advantages[2], torch.tensor([1.6, 4.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_what_was_sampled_is_reinforced_and_nothing_is_imitated(estimator: str) -> None:
    given, episodes, readings, reference = conversations()
    readings = replace(readings, values=torch.zeros(5, 5))
    config = PPOConfig(estimator=estimator)  # type: ignore[arg-type]
    result = estimate_targets(config, given, episodes, readings, reference, 0.1)
    assert set(result.weights) == {"rl", "ce"}
    assert torch.equal(result.weights["rl"], episodes.sampled.float())
    assert not result.weights["ce"].any()
    assert result.advantages.isfinite().all()
    assert (result.advantages[~episodes.sampled] == 0).all()


def test_whitened_rewards_of_two_turns_take_one_scale_and_wait_for_nobody() -> None:
    """Processes have episodes of different lengths: as many exchanges for one turn as for two."""
    config = replace(PLAIN, estimator="rloo", whiten_rewards=True)
    given, episodes, readings, reference = conversations()
    exchanged: list[int] = []

    def reduce(tensor: Tensor) -> Tensor:
        exchanged.append(tensor.numel())
        return tensor

    result = estimate_targets(config, given, episodes, readings, reference, 0.0, reduce)
    deviation = torch.tensor([5.0, 3.0, 6.0, 8.0, 0.0]).std()
    expected = on_answers([5 - 4.5, 3 - 5.5, 6 - 4.0, 8.0, -8.0], [3.0, -3.0, 0.0, 0.0, 0.0]) / deviation
    torch.testing.assert_close(result.advantages, expected)
    two_turns, exchanged[:] = list(exchanged), []
    first = episodes.turn == 0
    one_turn = replace(episodes, real=episodes.real & first, sampled=episodes.sampled & first)
    estimate_targets(config, given, one_turn, readings, reference, 0.0, reduce)
    assert exchanged == two_turns
