"""Paired tests and Holm's correction: numbers by hand, and that a test rejects as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagsr.evaluation.intervals import Interval, balanced_interval, holm, mean_interval, paired_p_value


def test_sign_flips_by_hand() -> None:
    # |+-1 +-2 +-3| reaches the observed 6 for two of the eight assignments of signs.
    assert paired_p_value([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    # Observed 2 - 1 - 1 = 0: everything is as extreme.
    assert paired_p_value([2, -1, -1], [0, 0, 0]) == 1.0
    # |+-3 +-1|: observed 2; 4, 2, 2, 4 are all as extreme. The sign of the difference makes none.
    assert paired_p_value([3, -1], [0, 0]) == paired_p_value([0, 0], [3, -1]) == 1.0


def test_pairs_without_a_difference_count_for_nothing() -> None:
    assert paired_p_value([1, 2, 3, 5, 5], [0, 0, 0, 5, 5]) == pytest.approx(2 / 8)
    assert paired_p_value(np.ones(40), np.ones(40)) == 1.0


def test_the_random_test_agrees_with_the_exact_one() -> None:
    differences = np.array([0.4, -0.1, 0.3, 0.2, -0.3, 0.5, 0.1, 0.2, -0.2, 0.6, 0.1, 0.05])
    exact = paired_p_value(differences, np.zeros(12))
    # A thirteenth pair without a difference changes nothing but the method.
    sampled = paired_p_value(np.append(differences, 0.0), np.zeros(13), resamples=20_000)
    assert sampled == pytest.approx(exact, abs=0.01)
    assert paired_p_value(np.ones(30), np.zeros(30), resamples=999) == pytest.approx(1 / 1000)


def test_a_true_null_is_rejected_at_its_level() -> None:
    generator = np.random.default_rng(1)
    values = [paired_p_value(row, np.zeros(25), resamples=199) for row in generator.normal(size=(300, 25))]
    assert 0.02 < np.mean(np.array(values) <= 0.05) < 0.09


def test_over_seeds_and_prompts_the_test_agrees_with_the_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=(4, 50))
    for shift in (0.05, 0.6):
        after = before + shift + 0.5 * generator.normal(size=(4, 50))
        interval = mean_interval(after - before, resamples=4000)
        assert (paired_p_value(after, before) < 0.05) == (interval.low > 0 or interval.high < 0)


def test_a_spread_between_seeds_weakens_the_test() -> None:
    prompts = np.random.default_rng(0).normal(0.3, 0.5, size=60)
    same = np.stack([prompts, prompts, prompts])
    spread = same + np.array([[-0.8], [0.0], [0.8]])  # one of three seeds loses
    assert paired_p_value(same, np.zeros_like(same)) < 0.01
    assert paired_p_value(spread, np.zeros_like(spread)) > 0.05


def test_one_seed_is_no_seed() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert paired_p_value(values[None], np.zeros((1, 20))) == paired_p_value(values, np.zeros(20))


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_p_value([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        paired_p_value([1, np.nan], [1, 1])


def test_holm_by_hand() -> None:
    # 3 * 0.01; 2 * 0.03; 1 * 0.04 is below the one before and takes its value.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-value"):
        holm([0.5, float("nan")])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(values)
    for p, corrected in zip(values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, len(values) * p) + 1e-12
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_strata_count_alike_whatever_their_sizes():
    assert balanced_interval([np.ones(400), np.zeros(2)]) == Interval(0.5, 0.5, 0.5)
    many, few = np.arange(400) % 4 == 0, np.arange(40) % 2 == 0
    found = balanced_interval([many, few], resamples=8000)
    assert found.mean == pytest.approx((0.25 + 0.5) / 2)
    half = 1.96 * 0.5 * np.sqrt(0.25 * 0.75 / 400 + 0.5 * 0.5 / 40)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    with pytest.raises(ValueError, match="not finite"):
        balanced_interval([many, [0.0, np.nan]])
