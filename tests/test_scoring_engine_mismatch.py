"""How far an engine is from the scoring pass, by hand, and what goes into the loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cagsr.config import RolloutConfig
from cagsr.errors import RolloutError
from cagsr.flow import EpisodeBatch, Prompt, PromptBatch, Readings
from cagsr.scoring.engine_mismatch import account_for_engine, importance_ratio

MASK = torch.tensor([[True, True], [True, False]])
OURS = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
ENGINE = torch.tensor([[-1.1, -2.0], [-3.0 - math.log(4.0), 0.0]])


def made(correction: torch.Tensor | None = None, engine: torch.Tensor | None = ENGINE) -> tuple[Readings, EpisodeBatch]:
    zeros = torch.zeros(2, 2)
    prompts = PromptBatch(
        (Prompt(1, "a"),) * 2,
        torch.ones(2, 1, dtype=torch.long),
        torch.ones(2, 1, dtype=torch.bool),
        torch.zeros(2, 1, dtype=torch.long),
        torch.ones(2, 1),
        torch.zeros(2, dtype=torch.long),
    )
    readings = Readings(OURS, zeros, zeros, zeros if correction is None else correction)
    episodes = EpisodeBatch.of_one_turn(prompts, torch.ones(2, 2, dtype=torch.long), MASK, MASK[:, 1], ("a", "b"))
    return readings, dataclasses.replace(episodes, sampler_logprobs=engine)


def test_numbers_by_hand():
    found, metrics = account_for_engine(*made(), RolloutConfig(max_logp_difference=1.0), lambda tensor: tensor)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx((0.1 + 0 + math.log(4)) / 3)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(4))
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(1.0)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx((math.exp(0.1) + 1 + 2) / 3)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(2.0)  # 4, truncated
    expected = torch.tensor([[0.1, 0.0], [math.log(2), 0.0]])
    torch.testing.assert_close(found.sampling_correction, expected, atol=1e-6, rtol=0)


def test_filters_are_no_mismatch():
    """The engine drew from what top-p left, half of the mass: it agrees with the policy, filtered as ours would be."""
    filtered = torch.where(MASK, math.log(0.5), 0.0)
    readings, rollout = made(filtered, OURS - filtered)
    found, metrics = account_for_engine(readings, rollout, RolloutConfig(), lambda tensor: tensor)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(found.sampling_correction, filtered)  # what our own sampler's correction would have been


def test_without_the_correction_only_our_own_filters_count():
    filtered = torch.where(MASK, -0.3, 0.0)
    readings, rollout = made(filtered)
    config = RolloutConfig(importance_sampling_correction=False, max_logp_difference=0)
    found, metrics = account_for_engine(readings, rollout, config, lambda tensor: tensor)
    assert found is readings
    assert metrics


def test_without_an_engine_nothing_is_said():
    readings, rollout = made(engine=None)
    assert account_for_engine(readings, rollout, RolloutConfig(), lambda tensor: tensor) == (readings, {})


def test_all_processes_count_and_all_stop():
    """A second process with one token, 3 nats apart."""
    other = torch.tensor([3.0, 3.0, 0.5, 0.5, 0.5, 1.0])
    config = RolloutConfig(max_logp_difference=2.0)
    readings, rollout = made()
    _, metrics = account_for_engine(readings, rollout, config, lambda tensor: torch.cat([tensor, other]))
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx((0.1 + math.log(4) + 3) / 4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(3.0)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(0.5)
    strict = dataclasses.replace(config, max_logp_difference=1.0)  # own mean 0.495: only together above the limit
    account_for_engine(readings, rollout, strict, lambda tensor: tensor)
    with pytest.raises(RolloutError, match="nats a token"):
        account_for_engine(readings, rollout, strict, lambda tensor: torch.cat([tensor, other]))


@pytest.mark.parametrize("worst", [-9999.0, float("nan")])
def test_what_the_engine_calls_impossible_stops_the_run(worst: float):
    """vLLM reports -inf as -9999; a comparison with NaN is False, and must not let it pass."""
    engine = ENGINE.clone()
    engine[0, 0] = worst
    with pytest.raises(RolloutError, match="nats a token"):
        account_for_engine(*made(engine=engine), RolloutConfig(), lambda tensor: tensor)


@settings(deadline=None)
@given(st.floats(-9999, 0), st.floats(-50, 0), st.floats(1, 10))
def test_the_weight_is_positive_and_truncated(engine: float, ours: float, cap: float):
    logprobs, said = torch.tensor([[ours, ours]]), torch.tensor([[engine, engine]])
    weights = importance_ratio(logprobs, said, torch.tensor([[True, False]]), cap)
    assert float(weights[0, 1]) == 1.0
    assert 0 < float(weights[0, 0]) <= cap * (1 + 1e-6)
    if engine <= ours and ours - engine < math.log(cap):
        assert float(weights[0, 0]) == pytest.approx(math.exp(ours - engine), rel=1e-3)
