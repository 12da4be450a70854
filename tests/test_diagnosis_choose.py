"""Choosing among many settings: never worse than the configured one, and judged where luck has no say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cagsr.config import AttentionConfig, CoverageConfig, RewardConfig
from cagsr.diagnosis.best_of_n import correlation
from cagsr.diagnosis.cross_fit import Products, choose_setting, compare, cross_fitted, folds, held_fixed
from cagsr.diagnosis.diagnose import diagnose
from cagsr.diagnosis.recommend import fit_weights, recommend, term_columns, weighted_parts, yaml_of
from cagsr.diagnosis.signals import Setting, Signals, layer_choices
from cagsr.flow import EncodedPrompt, Prompt

Floats = NDArray[np.float64]
CONFIGURED = Setting("all", "sum", 0.3)
GOOD = Setting("3", "sum", 0.1)


def signals_of(
    coverage: dict[Setting, Floats],
    truth: Floats | None,
    length: Floats,
    configured: Setting = CONFIGURED,
    **terms: Any,
) -> Signals:
    """Signals with these coverages; the other terms say nothing unless given."""
    prompts, candidates = length.shape
    nothing = np.zeros_like(length)
    by_layers = {
        one.layers: {"copy_coverage": nothing, "grounded_coverage": nothing, "focus": nothing} for one in coverage
    }
    others = dict.fromkeys(("self_certainty", "repetition", *by_layers[configured.layers]), nothing)
    return Signals(
        terms={"coverage": coverage[configured], **others, "length": length, **terms},
        coverage=coverage,
        by_layers=by_layers,
        configured=configured,
        length=length,
        repetition=nothing,
        ended=np.ones_like(length),
        prompts=tuple(EncodedPrompt(Prompt(i + 1, f"cat {i}"), (1,), (0,), (1.0,)) for i in range(prompts)),
        completions=tuple(tuple(f"{i} {j}" for j in range(candidates)) for i in range(prompts)),
        truth=truth,
        truth_name="judge",
    )


def noisy(seed: int, prompts: int = 40, settings: int = 100, sees: dict[Setting, float] | None = None) -> Signals:
    """Settings that see nothing but for those of ``sees`` (setting -> correlation), and a truth that grows with length."""
    g = np.random.default_rng(seed)
    shape = (prompts, 8)
    content, length = g.normal(size=shape), g.normal(size=shape)
    names = [CONFIGURED, GOOD, *(Setting(str(10 + n // 5), "sum", 0.1 * (1 + n % 5)) for n in range(settings - 2))]
    found = {}
    for one in names:
        r = (sees or {}).get(one, 0.0)
        found[one] = 0.5 + 0.05 * (r * content + np.sqrt(1 - r * r) * g.normal(size=shape))
    return signals_of(found, content + 0.5 * length, 20 + 3 * length)


# ---- the statistic ----


def test_length_held_fixed_by_hand():
    # One prompt. Centred: x = (-1, 1, 0), z = (-1, 0, 1), y = x + 2 z = (-3, 1, 2).
    x, z = np.array([[1.0, 3.0, 2.0]]), np.array([[4.0, 5.0, 6.0]])
    y = x + 2 * z
    # xy = 4, xx = 2, yy = 14; without z: xz = 1, yz = 5, zz = 2: xy - 5/2 = 3/2, xx - 1/2 = 3/2, yy - 25/2 = 3/2.
    assert correlation(x, y) == pytest.approx(4 / np.sqrt(28))
    assert held_fixed(x, y, z) == pytest.approx(1.0)
    assert held_fixed(z, y, z) == 0.0  # nothing is left of length itself
    assert held_fixed(x, y, np.ones((1, 3))) == pytest.approx(
        4 / np.sqrt(28)
    )  # length that does not vary holds nothing
    assert held_fixed(np.ones((1, 3)), y, z) == 0.0


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_it_is_the_correlation_of_what_length_leaves(seed: int):
    g = np.random.default_rng(seed)
    x, y, z = (g.normal(size=(6, 4)) + 5 * g.normal(size=(6, 1)) for _ in range(3))
    cx, cy, cz = (one - one.mean(axis=1, keepdims=True) for one in (x, y, z))
    left = [one - cz * (one * cz).sum() / (cz * cz).sum() for one in (cx, cy)]
    assert held_fixed(x, y, z) == pytest.approx(np.corrcoef(left[0].ravel(), left[1].ravel())[0, 1])
    free = Products.of([x], y, z).correlations(np.ones((1, 6)), hold_length=False)[0, 0]
    assert free == pytest.approx(correlation(x, y))


def test_every_prompt_is_judged_once_by_a_choice_without_it():
    seen = []

    def chosen(others: NDArray[np.int64], part: NDArray[np.int64]) -> Floats:
        assert not set(others) & set(part)
        assert len(others) + len(part) == 23
        seen.extend(part.tolist())
        return np.tile(part[:, None].astype(float), 2)

    assert cross_fitted((23, 2), chosen)[:, 1].tolist() == list(range(23))
    assert sorted(seen) == list(range(23))
    assert len(folds(2)) == 2


def test_weights_leave_to_length_what_length_explains():
    g = np.random.default_rng(0)
    a, length = g.normal(size=(2, 300, 8))
    columns = {"coverage": a, "focus": length + 0.1 * g.normal(size=a.shape)}
    assert set(fit_weights(columns, a + 2 * length)) == {"coverage", "focus"}
    assert set(fit_weights(columns, a + 2 * length, length=length)) == {"coverage"}
    assert set(fit_weights(columns, a - 2 * length, length=length)) == {"coverage"}  # of either sign


# ---- layers and threshold ----


def test_one_good_setting_among_a_hundred_is_found():
    signals = noisy(0, sees={GOOD: 0.8, CONFIGURED: 0.5})
    choice = choose_setting(signals, signals.truth)
    assert (choice.setting, choice.best, choice.candidates) == (GOOD, GOOD, 100)
    assert choice.compared.new.mean == pytest.approx(0.8, abs=0.08)
    assert choice.compared.old.mean == pytest.approx(0.5, abs=0.1)
    assert choice.compared.difference.low > 0


def test_the_choice_is_unbiased_where_nothing_sees_anything():
    """The best of a hundred looks good where it was chosen, and is worth nothing elsewhere."""
    looks, worth, kept = [], [], 0
    for seed in range(40):
        signals = noisy(seed)
        choice = choose_setting(signals, signals.truth)
        looks.append(held_fixed(signals.coverage[choice.best], signals.truth, signals.length))
        worth.append(choice.compared.new.mean)
        kept += choice.setting == CONFIGURED
    assert min(looks) > 0.05
    assert np.mean(looks) > 0.12
    assert abs(np.mean(worth)) < 3 * np.std(worth) / np.sqrt(len(worth))
    assert kept >= 36


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3, 0.6]), st.sampled_from([0.0, 0.3]))
@settings(max_examples=12, deadline=None)
def test_the_choice_is_never_worse_than_the_configured_one_on_the_table(seed: int, good: float, own: float):
    signals = noisy(seed, prompts=12, settings=30, sees={GOOD: good, CONFIGURED: own})
    reward = weighted_parts(signals.terms, {"coverage": 1.0})["coverage"]
    found = recommend(signals, reward, {"coverage": 1.0})
    new = weighted_parts(term_columns(signals, found.setting), found.weights)
    for chosen, configured in (
        (signals.coverage[found.setting], signals.coverage[CONFIGURED]),
        (sum(new.values(), np.zeros_like(reward)), reward),
    ):
        if found.weights:
            assert held_fixed(chosen, signals.truth, signals.length) >= held_fixed(
                configured, signals.truth, signals.length
            )
            assert correlation(chosen, signals.truth) >= correlation(configured, signals.truth) - 1e-12


def test_a_term_that_needs_no_attention_does_not_hide_bad_layers():
    """As on Gemma 3 270M: associations see most, so that all layers gave sums alike, and a poor one was recommended."""
    poor = Setting("last-4", "sum", 0.05)
    signals = noisy(1, prompts=60, settings=20, sees={GOOD: 0.75, CONFIGURED: 0.5})
    g = np.random.default_rng(2)
    content = signals.truth - 0.5 * (signals.length - 20) / 3
    worse = {**signals.coverage, poor: 0.5 + 0.05 * (0.4 * content + 0.9 * g.normal(size=content.shape))}
    associated = content + 0.2 * g.normal(size=content.shape)
    signals = signals_of(worse, signals.truth, signals.length, associated_coverage=associated)
    found = diagnose(signals, {"coverage": 1.0})
    assert found.recommendation.setting in (GOOD, CONFIGURED)
    assert found.recommendation.weights["associated_coverage"] > 0.5
    assert "The best coverage is at layers 3, threshold 0.1, of 21 choices" in found.recommendation.reasons[0]


def test_of_equals_the_nearest_to_the_configured_setting_is_chosen():
    signals = noisy(3, settings=2, sees={GOOD: 0.8})
    same = {Setting("3", "sum", tau): signals.coverage[GOOD] for tau in (0.05, 0.1, 0.2, 0.4, 0.5)}
    signals = signals_of({CONFIGURED: signals.coverage[CONFIGURED], **same}, signals.truth, signals.length)
    assert choose_setting(signals, signals.truth).setting in (Setting("3", "sum", 0.2), Setting("3", "sum", 0.4))


def test_early_layers_single_layers_and_all_are_candidates():
    names = layer_choices(range(40), "last-4")
    assert {"all", "last-4", "last-1", "0", "1", "2", "3", "4"} <= set(names)
    assert names["all"] == tuple(range(40))
    assert len([name for name in names if name.isdigit()]) == 11  # the twelfth is last-1
    assert set(map(str, range(11))) <= set(layer_choices(range(12), "last-4"))


# ---- the reward ----


def test_the_configured_reward_stays_where_nothing_is_better():
    signals = noisy(4, prompts=12, settings=20, sees={CONFIGURED: 0.7})
    weights = {"coverage": 1.0, "repetition": -0.5, "focus": 0.0}
    found = diagnose(signals, weights)
    recommendation = found.recommendation
    assert recommendation.configured
    assert recommendation.setting == CONFIGURED
    assert recommendation.weights == {"coverage": 1.0, "repetition": -0.5}
    assert recommendation.compared.difference.mean == pytest.approx(0.0, abs=0.01)
    assert "so the configured reward stays" in recommendation.reasons[-1]
    rows = {one.name: one for one in found.signals}
    assert rows["recommended reward"].truth == rows["configured reward"].truth
    # What is written is what was measured, whole.
    measured = RewardConfig(coverage=CoverageConfig(weight=2.0), normalize="running", functions=["a.b"])
    assert yaml_of(recommendation, AttentionConfig(layers="all"), measured) == {
        "attention": {"layers": "all"},
        "reward": {"coverage": {"weight": 2.0}, "normalize": "running", "functions": ["a.b"]},
    }


def test_a_function_of_the_users_that_sees_more_is_not_replaced():
    signals = noisy(5, sees={GOOD: 0.6, CONFIGURED: 0.3})
    content = signals.truth - 0.5 * (signals.length - 20) / 3
    signals = signals_of(dict(signals.coverage), signals.truth, signals.length, own=content)
    reward = weighted_parts(signals.terms, {"own": 1.0})["own"]
    found = recommend(signals, reward, {"own": 1.0, "coverage": 0.0})
    assert found.configured
    assert found.weights == {"own": 1.0}
    assert found.compared.old.mean > 0.99 > found.compared.new.mean


def test_what_is_said_of_a_fitted_reward_holds_on_other_prompts():
    """Columns of noise: weights fitted to them see the truth where they were fitted, and nothing elsewhere."""
    found = []
    for seed in range(8):
        signals = noisy(seed, prompts=20, settings=10)
        configured = weighted_parts(signals.terms, {"coverage": 1.0})["coverage"]
        found.append(recommend(signals, configured, {"coverage": 1.0}).compared.new.mean)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_without_truth_the_setting_rests_on_agreement_and_says_so():
    signals = noisy(6, sees={GOOD: 0.9})
    content = signals.truth - 0.5 * (signals.length - 20) / 3
    signals = signals_of(dict(signals.coverage), None, signals.length, self_certainty=content)
    found = recommend(signals, signals.coverage[CONFIGURED], {"coverage": 1.0})
    assert found.setting == GOOD
    assert found.compared is None
    assert "signals that read no attention" in found.reasons[0]
    assert "not on truth" in found.reasons[1]
    blind = signals_of(
        dict(signals.coverage), None, signals.length, self_certainty=np.random.default_rng(0).normal(size=(40, 8))
    )
    assert recommend(blind, blind.coverage[CONFIGURED], {"coverage": 1.0}).setting == CONFIGURED


def test_an_interval_narrows_with_prompts_and_holds_the_truth():
    few, many = (noisy(8, prompts=n, settings=2, sees={GOOD: 0.6}) for n in (10, 160))
    wide, narrow = (compare(s.coverage[GOOD], s.coverage[CONFIGURED], s.truth, s.length) for s in (few, many))
    assert narrow.new.high - narrow.new.low < 0.5 * (wide.new.high - wide.new.low)
    assert narrow.new.low < 0.6 < narrow.new.high
