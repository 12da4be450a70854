"""Grounded coverage against numbers worked out by hand, and its invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cagsr.reward.terms.grounded_coverage import grounded_coverage, grounded_coverage_gains

# prompt tokens 7 8 9 5: word 0 has the pieces 7 and 8, word 1 is 9, token 5 is no salient word
PROMPT = torch.tensor([[7, 8, 9, 5]])
WORDS = torch.tensor([[0, 0, 1, -1]])
SALIENCE = torch.tensor([[3.0, 1.0]])
RESPONSE = torch.tensor([[7, 9, 5]])
SAME = RESPONSE[:, :, None] == PROMPT[:, None, :]
ATTENTION = torch.tensor([[[0.1, 0.6, 0.1, 0.1], [0.7, 0.0, 0.05, 0.2], [0.0, 0.0, 0.9, 0.9]]])


def test_by_hand():
    # piece 7 is said at t = 0 with attention 0.1 of tau 0.2 -> 0.5; piece 8 is never said -> 0; word 0: 0.25 of salience 0.75
    # word 1 (token 9) is said at t = 1 with 0.05 of 0.2 -> 0.25 of salience 0.25; the 0.9 at t = 2 says another token
    found = grounded_coverage(ATTENTION, SAME, WORDS, SALIENCE, 0.2)
    assert float(found) == pytest.approx(0.75 * 0.25 + 0.25 * 0.25)
    gains = grounded_coverage_gains(ATTENTION, SAME, WORDS, SALIENCE, 0.2)
    assert gains[0].tolist() == pytest.approx([0.75 * 0.25, 0.25 * 0.25, 0.0])


def test_padding_says_nothing():
    mask = torch.tensor([[True, False, True]])
    found = grounded_coverage(ATTENTION, SAME & mask[:, :, None], WORDS, SALIENCE, 0.2)
    assert float(found) == pytest.approx(0.75 * 0.25)


def test_nothing_said_and_nothing_salient():
    empty = torch.zeros(1, 0, 4)
    assert grounded_coverage(empty, empty.bool(), WORDS, SALIENCE, 0.2).tolist() == [0.0]
    none = torch.full_like(WORDS, -1)
    assert grounded_coverage(ATTENTION, SAME, none, torch.zeros(1, 0), 0.2).tolist() == [0.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9))
def test_gains_sum_to_the_coverage_which_plain_looking_bounds(seed: int, threshold: float):
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, 5, 6, generator=g).softmax(2)
    response, prompt = torch.randint(0, 4, (3, 5), generator=g), torch.randint(0, 4, (3, 6), generator=g)
    mask = torch.arange(5) < torch.randint(0, 6, (3, 1), generator=g)
    words, salience = torch.randint(-1, 3, (3, 6), generator=g), torch.rand(3, 3, generator=g)
    same = (response[:, :, None] == prompt[:, None, :]) & mask[:, :, None] & (words >= 0)[:, None, :]
    arguments = (attention, same, words, salience, threshold)
    whole, gains = grounded_coverage(*arguments), grounded_coverage_gains(*arguments)
    torch.testing.assert_close(gains.sum(1), whole, atol=1e-6, rtol=0)
    assert (gains >= 0).all()
    # if every response token said every prompt token, looking would be enough: nothing covers more than that
    bound = grounded_coverage(attention, mask[:, :, None].expand_as(same), words, salience, threshold)
    assert (whole <= bound + 1e-6).all()
    # padding more, on either side, changes nothing
    padded = grounded_coverage(
        torch.nn.functional.pad(attention, (2, 0, 0, 1)),
        torch.nn.functional.pad(same, (2, 0, 0, 1)),
        torch.nn.functional.pad(words, (2, 0), value=-1),
        salience,
        threshold,
    )
    torch.testing.assert_close(padded, whole)
