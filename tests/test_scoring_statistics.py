"""Per-token statistics: against torch's own distributions, and what sampling filters change."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical

from cagsr.config import SamplingConfig
from cagsr.models.generation import GenerationRules
from cagsr.scoring.statistics import (
    certainty_of,
    entropy_of,
    logprobs_and,
    readings_of,
    sampling_correction,
    token_logprobs,
)


def test_logprobs_and_entropy_are_those_of_the_tempered_softmax():
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 7), torch.randint(0, 7, (6,))
    expected = Categorical(logits=logits / 0.7)
    torch.testing.assert_close(token_logprobs(logits, ids, 0.7), expected.log_prob(ids))
    torch.testing.assert_close(
        token_logprobs(logits.view(2, 3, 7), ids.view(2, 3), 0.7).flatten(), expected.log_prob(ids)
    )
    found = logprobs_and(entropy_of, temperature=0.7)(logits, ids, torch.arange(6))
    torch.testing.assert_close(found, torch.stack([expected.log_prob(ids), expected.entropy()], dim=1))


def test_a_scoring_pass_reads_logprob_entropy_certainty_and_correction_in_this_order():
    torch.manual_seed(0)
    logits, ids, place = 3 * torch.randn(6, 7), torch.randint(0, 7, (6,)), torch.arange(6)
    sampling = SamplingConfig(temperature=0.7, top_p=0.8, top_k=5, min_new_tokens=2)
    found = readings_of(sampling, (3, 4), GenerationRules())(logits, ids, place)
    expected = Categorical(logits=logits / 0.7)
    certainty = certainty_of((logits / 0.7).log_softmax(-1))
    correction = sampling_correction(sampling, (3, 4))(logits, place)
    torch.testing.assert_close(
        found, torch.stack([expected.log_prob(ids), expected.entropy(), certainty, correction], dim=1)
    )
    greedy = readings_of(SamplingConfig(temperature=0.0), (3,), GenerationRules())(logits, ids, place)
    torch.testing.assert_close(greedy[:, 0], logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    found = token_logprobs(logits, torch.tensor([2]), 1.0)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(3 - math.log(sum(map(math.exp, (1, 2, 3)))), abs=1e-6)


def test_without_filters_nothing_is_corrected():
    assert sampling_correction(SamplingConfig(), (0,))(torch.randn(2, 5), torch.arange(2)).tolist() == [0.0, 0.0]


def test_correction_is_the_log_of_the_mass_that_may_be_sampled():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2, 4)

    def mass(sampling: SamplingConfig) -> list[float]:
        found: list[float] = sampling_correction(sampling, (3,))(logits, torch.arange(2)).exp().tolist()
        return found

    assert mass(SamplingConfig(top_k=2)) == pytest.approx([0.8, 0.8], abs=1e-6)
    assert mass(SamplingConfig(top_p=0.85)) == pytest.approx([0.95, 0.95], abs=1e-6)
    # the stop token 3 is forbidden in the first position only
    assert mass(SamplingConfig(min_new_tokens=1)) == pytest.approx([0.95, 1.0], abs=1e-6)
