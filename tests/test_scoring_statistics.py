"""Per-token statistics: against torch's own distributions, and what sampling filters change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode

from cagsr.config import SamplingConfig
from cagsr.scoring import statistics
from cagsr.scoring.statistics import (
    certainty_of,
    entropy_of,
    logprobs_and,
    sampling_correction,
    token_entropy,
    token_logprobs,
)


def test_logprobs_and_entropy_are_those_of_the_tempered_softmax():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    expected = Categorical(logits=logits / 0.7)
    torch.testing.assert_close(token_logprobs(logits, ids, 0.7), expected.log_prob(ids))
    torch.testing.assert_close(token_entropy(logits, 0.7), expected.entropy())


@pytest.mark.parametrize("block", [1, 3 * 7, 2**22])
def test_blocks_change_neither_values_nor_gradients(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", block)
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (2, 5))
    seen = []
    for direct in (True, False):
        logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
        expected = Categorical(logits=logits / 0.7)
        if direct:
            pairs = [(expected.log_prob(ids), expected.entropy())]
        else:
            pairs = [
                (token_logprobs(logits, ids, 0.7), token_entropy(logits, 0.7)),
                logprobs_and(entropy_of, logits=logits, ids=ids, temperature=0.7),
            ]
        for logprobs, entropy in pairs:
            logits.grad = None
            (logprobs * torch.arange(10.0).view(2, 5) + entropy.square()).sum().backward()
            assert logits.grad is not None
            seen.append((logprobs.detach(), entropy.detach(), logits.grad))
    for found in seen[1:]:
        torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_vocabulary_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", 4 * 1000)
    kept: list[int] = []
    logits = torch.randn(4, 8, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        token_logprobs(logits, torch.zeros(4, 8, dtype=torch.long), 1.0).sum()
        logprobs_and(entropy_of, logits=logits, ids=torch.zeros(4, 8, dtype=torch.long), temperature=1.0)[1].sum()
    # Only views of the logits themselves and the ids.
    large = {address for address in kept if address != logits.untyped_storage().data_ptr()}
    assert len(large) <= 2


@pytest.mark.parametrize("block", [1, 3 * 7, 2**22])
def test_blocks_change_neither_certainty_nor_correction(block: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    logits, ids = 3 * torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    sampling = SamplingConfig(temperature=0.7, top_p=0.8, top_k=5, min_new_tokens=2)
    whole = sampling_correction(logits, ids, sampling, (3, 4))
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", block)
    logprobs, entropy, certainty = logprobs_and(entropy_of, certainty_of, logits=logits, ids=ids, temperature=0.7)
    torch.testing.assert_close((logprobs, entropy), logprobs_and(entropy_of, logits=logits, ids=ids, temperature=0.7))
    torch.testing.assert_close(certainty, certainty_of((logits / 0.7).log_softmax(-1)))
    torch.testing.assert_close(sampling_correction(logits, ids, sampling, (3, 4)), whole)
    assert (whole[:, :2] < whole[:, 2:].amax()).all()


def test_scoring_holds_nothing_of_the_size_of_all_logits(monkeypatch: pytest.MonkeyPatch):
    """With 40 blocks, no more than a few blocks' worth is allocated at a time."""
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", 1000)
    logits, ids = torch.randn(4, 10, 1000), torch.zeros(4, 10, dtype=torch.long)
    sampling = SamplingConfig(top_p=0.9, min_new_tokens=2)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            mine = logits.untyped_storage().data_ptr()
            for one in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() != mine:
                    self.numbers = max(self.numbers, one.numel())
            return found

    with torch.no_grad(), Largest() as largest:
        logprobs_and(entropy_of, certainty_of, logits=logits, ids=ids, temperature=0.7)
        sampling_correction(logits, ids, sampling, (3, 4))
    assert 1000 <= largest.numbers <= 1000


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.bfloat16)
    found = token_logprobs(logits, torch.tensor([[2]]), 1.0)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(3 - math.log(sum(map(math.exp, (1, 2, 3)))), abs=1e-6)


def test_without_filters_nothing_is_corrected():
    found = sampling_correction(torch.randn(1, 2, 5), torch.tensor([[1, 2]]), SamplingConfig(), (0,))
    assert found.tolist() == [[0.0, 0.0]]


def test_correction_is_the_log_of_the_mass_that_may_be_sampled():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().view(1, 1, 4).expand(1, 2, 4)
    ids = torch.tensor([[0, 1]])
    top_k = sampling_correction(logits, ids, SamplingConfig(top_k=2), (3,))
    assert top_k.exp().tolist()[0] == pytest.approx([0.8, 0.8], abs=1e-6)
    top_p = sampling_correction(logits, ids, SamplingConfig(top_p=0.85), (3,))
    assert top_p.exp().tolist()[0] == pytest.approx([0.95, 0.95], abs=1e-6)
    # the stop token 3 is forbidden in the first position only
    shortest = sampling_correction(logits, ids, SamplingConfig(min_new_tokens=1), (3,))
    assert shortest.exp().tolist()[0] == pytest.approx([0.95, 1.0], abs=1e-6)
