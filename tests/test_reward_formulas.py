"""Every reward term against numbers worked out by hand, and what padding, masks and order must not change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cagsr.reward.pooling import add_at_last_token, normalized_salience, pool_pieces
from cagsr.reward.terms.copy_coverage import copy_coverage
from cagsr.reward.terms.coverage import coverage_gains, saturating_coverage
from cagsr.reward.terms.focus import focus
from cagsr.reward.terms.length import length
from cagsr.reward.terms.mean_mass import mean_mass
from cagsr.reward.terms.repetition import ngram_repetition, repeated_ngrams, without_stop_token
from cagsr.reward.terms.self_certainty import mean_certainty
from cagsr.scoring.statistics import certainty_of

T, F = True, False


def close(actual: Tensor, expected: list, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=tolerance, rtol=0)


# --- pooling -------------------------------------------------------------------------------------------------


def test_pieces_of_a_word_count_once() -> None:
    attention = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]])
    words = torch.tensor([[-1, 1, 0, 1]])
    close(pool_pieces(attention, words, 3, "sum"), [[[0.3, 0.6, 0.0], [0.2, 0.4, 0.0]]])
    close(pool_pieces(attention, words, 3, "max"), [[[0.3, 0.4, 0.0], [0.2, 0.3, 0.0]]])


def test_unimportant_tokens_do_not_leak_into_word_zero() -> None:
    attention = torch.tensor([[[0.9, 0.1]]], dtype=torch.bfloat16)
    for how in ("sum", "max"):
        pooled = pool_pieces(attention, torch.tensor([[-1, 0]]), 1, how)  # type: ignore[arg-type]
        assert pooled.dtype == torch.float32
        close(pooled, [[[0.1]]], 1e-3)


def test_pooling_without_words_and_with_bad_indices() -> None:
    attention = torch.rand(2, 3, 4)
    assert pool_pieces(attention, torch.full((2, 4), -1), 0).shape == (2, 3, 0)
    with pytest.raises(ValueError, match="index 5"):
        pool_pieces(attention, torch.full((2, 4), 5), 3)
    with pytest.raises(ValueError, match="shape"):
        pool_pieces(attention, torch.zeros(2, 5, dtype=torch.int64), 1)


# --- coverage ------------------------------------------------------------------------------------------------


def test_saturating_coverage_by_hand() -> None:
    # tau 0.4. Word 0 (weight 3): best 0.2 -> 0.5. Word 1 (weight 1): best 0.8 -> 1. C = (3 * 0.5 + 1) / 4 = 0.625.
    attention = torch.tensor([[[0.1, 0.2], [0.2, 0.8], [0.0, 0.3]]])
    salience, mask = torch.tensor([[3.0, 1.0]]), torch.tensor([[T, T, T]])
    close(saturating_coverage(attention, salience, mask, 0.4), [0.625])
    # Token 0 brings word 0 to 0.25 and word 1 to 0.5; token 1 the rest; token 2 nothing.
    close(coverage_gains(attention, salience, mask, 0.4), [[0.3125, 0.3125, 0.0]])


def test_masked_tokens_do_not_cover() -> None:
    attention = torch.tensor([[[0.1, 0.0], [1.0, 1.0]]])
    salience, mask = torch.tensor([[1.0, 1.0]]), torch.tensor([[T, F]])
    close(saturating_coverage(attention, salience, mask, 0.2), [0.25])
    close(coverage_gains(attention, salience, mask, 0.2), [[0.25, 0.0]])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 4), st.integers(0, 7), st.integers(1, 5)),
    threshold=st.floats(0.05, 1.0),
)
def test_gains_telescope(seed: int, shape: tuple[int, int, int], threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, response, words = shape
    attention = torch.rand(batch, response, words, generator=generator)
    salience = torch.rand(batch, words, generator=generator)
    lengths = torch.randint(0, response + 1, (batch, 1), generator=generator)
    mask = torch.arange(response) < lengths
    gains = coverage_gains(attention, salience, mask, threshold)
    coverage = saturating_coverage(attention, salience, mask, threshold)
    torch.testing.assert_close(gains.sum(1), coverage, atol=1e-6, rtol=0)
    assert (gains >= 0).all()
    assert (gains[~mask] == 0).all()
    assert (coverage <= 1 + 1e-6).all()


def test_salience_is_normalized_and_zero_stays_zero() -> None:
    close(normalized_salience(torch.tensor([[1.0, 3.0], [0.0, 0.0]])), [[0.25, 0.75], [0.0, 0.0]])


def test_copy_coverage_by_hand() -> None:
    prompt_ids = torch.tensor([[7, 8, 9, 5]])
    words = torch.tensor([[0, 0, 1, -1]])  # word 0 = pieces 7 8, word 1 = 9
    response_ids = torch.tensor([[8, 4, 9]])
    same = response_ids[:, :, None] == prompt_ids[:, None, :]
    mask = torch.tensor([[T, T, T]])
    salience = torch.tensor([[3.0, 1.0]])
    # Word 0 is looked at hardest by token 0, which is its piece 8: hit. Word 1 by token 1, which is 4: miss.
    attention = torch.tensor([[[0.5, 0.1], [0.2, 0.6], [0.1, 0.5]]])
    close(copy_coverage(attention, salience, same, mask, words), [0.75])
    # With token 1 masked the hardest look at word 1 is token 2, which says it.
    mask = torch.tensor([[T, F, T]])
    close(copy_coverage(attention, salience, same, mask, words), [1.0])
    # A word that nobody looks at is not covered, though the answer's first token happens to be it.
    nobody = torch.zeros(1, 3, 2)
    close(copy_coverage(nobody, salience, same, mask, words), [0.0])


def test_mean_mass_by_hand() -> None:
    attention = torch.tensor([[[0.5, 0.2, 0.1], [0.1, 0.3, 0.2], [0.9, 0.9, 0.9]]])
    close(mean_mass(attention, torch.tensor([[-1, 0, 1]]), torch.tensor([[T, T, F]])), [(0.3 + 0.5) / 2])


# --- focus ---------------------------------------------------------------------------------------------------


def test_focus_by_hand() -> None:
    # Token 0: shares 3/4, 1/4; token 1 looks at one word only; token 2 at none, which counts as spread.
    attention = torch.tensor([[[0.3, 0.1], [0.0, 0.2], [0.0, 0.0]]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    salience, mask = torch.tensor([[5.0, 0.1]]), torch.tensor([[T, T, T]])
    close(focus(attention, salience, mask), [((1 - entropy) + 1 + 0) / 3])
    close(focus(attention, salience, mask, 0.9), [(0.1 + 0.1 + 0) / 3])


def test_focus_ignores_words_without_salience_and_is_defined_for_one_word() -> None:
    attention = torch.tensor([[[0.2, 0.2, 0.6]], [[0.2, 0.2, 0.6]]])
    salience = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    close(focus(attention, salience, torch.tensor([[T], [T]])), [0.0, 0.0])
    one_of_three = torch.tensor([[1.0, 1.0, 1.0]])
    assert float(focus(attention[:1], one_of_three, torch.tensor([[T]]))) > 0.1


# --- repetition ----------------------------------------------------------------------------------------------


def test_repetition_by_hand() -> None:
    # Bigrams of 1 2 1 2 1: 12 21 12 21 -> 2 distinct of 4; the second 12 ends at token 3, the second 21 at token 4.
    ids = torch.tensor([[1, 2, 1, 2, 1, 0], [3, 3, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0]])
    mask = torch.tensor([[T, T, T, T, T, F], [T, T, T, F, F, F], [T, F, F, F, F, F]])
    close(ngram_repetition(ids, mask, 2), [0.5, 0.5, 0.0])
    close(
        repeated_ngrams(ids, mask, 2),
        [[0.0, 0.0, 0.0, 0.25, 0.25, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0, 0.0], [0.0] * 6],
    )
    close(ngram_repetition(ids, mask, 4), [0.0, 0.0, 0.0])
    close(ngram_repetition(ids, mask, 9), [0.0, 0.0, 0.0])


def test_repetition_does_not_compare_answers() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    close(ngram_repetition(ids, torch.ones(2, 3, dtype=torch.bool), 2), [0.0, 0.0])


def test_the_stop_token_is_left_out_only_where_the_answer_ended() -> None:
    mask = torch.tensor([[T, T, F], [T, T, T], [F, F, F]])
    expected = torch.tensor([[T, F, F], [T, T, T], [F, F, F]])
    assert torch.equal(without_stop_token(mask, torch.tensor([T, F, T])), expected)


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=4), n=st.integers(1, 4))
def test_repetition_equals_counting(answers: list[list[int]], n: int) -> None:
    width = max(map(len, answers)) + 2
    ids = torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])
    mask = torch.tensor([[T] * len(answer) + [F] * (width - len(answer)) for answer in answers])
    expected = []
    for answer in answers:
        grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    close(ngram_repetition(ids, mask, n), expected)


# --- certainty, length, pay ----------------------------------------------------------------------------------


def test_self_certainty_by_hand() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    expected = sum(0.25 * math.log(0.25 / x) for x in p.tolist())
    close(certainty_of((p.log() + 7.0).log_softmax(-1)), expected)  # type: ignore[arg-type]
    close(certainty_of(torch.zeros(2, 3, 5).log_softmax(-1)), [[0.0] * 3] * 2)
    close(mean_certainty(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[T, T, F]])), [2.0])


def test_length_by_hand() -> None:
    mask = torch.tensor([[T, T, F], [F, F, F], [T, T, T]])
    close(length(mask), [2.0, 0.0, 3.0])
    close(length(mask, target=2), [0.0, 2.0, 1.0])


def test_amounts_land_on_the_last_real_token() -> None:
    mask = torch.tensor([[T, T, F], [F, F, F], [T, T, T], [T, F, T]])
    paid = add_at_last_token(torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    close(paid, [[1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 4.0], [1.0, 1.0, 5.0]])
    assert add_at_last_token(torch.ones(2, 0), torch.ones(2), torch.ones(2, 0, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize("response", [0, 2])
def test_answers_without_tokens_give_zero(response: int) -> None:
    mask = torch.zeros(1, response, dtype=torch.bool)
    attention, salience = torch.rand(1, response, 3), torch.ones(1, 3)
    ids, words = torch.zeros(1, response, dtype=torch.int64), torch.arange(3)[None]
    for value in (
        saturating_coverage(attention, salience, mask, 0.3),
        coverage_gains(attention, salience, mask, 0.3).sum(1),
        copy_coverage(attention, salience, torch.zeros(*mask.shape, words.shape[1], dtype=torch.bool), mask, words),
        mean_mass(attention, words, mask),
        focus(attention, salience, mask),
        ngram_repetition(ids, mask, 3),
        mean_certainty(torch.rand(1, response), mask),
        length(mask),
    ):
        close(value, [0.0])
