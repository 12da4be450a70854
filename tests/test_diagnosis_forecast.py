"""The forecast of a turn: features by hand, turning points by hand, and a fit that recovers what made its data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cagsr.diagnosis.forecast import (
    FEATURES,
    PILOT,
    ForecastModel,
    expected_best,
    fit_forecast,
    pilot_features,
    turning_step,
)

EXPECTED = expected_best(8) / expected_best(2)


def rows(**metrics: list[float]) -> list[dict[str, float]]:
    """A pilot in which everything stands still but what is given."""
    still = {
        "objective/kl": 1.0,
        "policy/entropy_avg": 2.0,
        "response/length": 20.0,
        "response/repetition": 0.1,
        "rewards/total/length_correlation": 0.5,
        "rewards/total/likelihood_correlation": -0.25,
        "rewards/total/repetition_correlation": 0.0,
        "rewards/focus/agreement": 0.4,
        "rewards/focus/gain_2": 0.2,
        "rewards/focus/gain_all": 0.2 * EXPECTED,
        "kl_coef": 0.05,
    }
    return [
        {name: metrics[name][step] if name in metrics else value for name, value in still.items()}
        for step in range(PILOT)
    ]


def test_features_by_hand():
    found = pilot_features(rows(), 8)
    assert set(found) == set(FEATURES)
    assert found == pytest.approx(
        {
            "kl": math.log(1.1),
            **dict.fromkeys(
                ("kl_growth", "entropy_change", "length_change", "repetition_change", "agreement_change"), 0.0
            ),
            **{"length_correlation": 0.5, "likelihood_correlation": -0.25, "repetition_correlation": 0.0},
            **{"agreement": 0.4, "tail": 1.0, "kl_coef": math.log(0.05)},
        },
        abs=1e-9,
    )
    moving = pilot_features(
        rows(
            **{
                "objective/kl": [0.02 * step**2 - 0.1 + 0.1 for step in range(1, 11)],
                "response/length": [20.0] * 3 + [25.0] * 4 + [30.0] * 3,
                "rewards/focus/gain_all": [-0.1 * EXPECTED] * 10,
                "rewards/focus/agreement": [0.5] * 5 + [0.1] * 5,
            }
        ),
        8,
    )
    assert moving["length_change"] == pytest.approx(0.5)
    assert moving["tail"] == pytest.approx(-0.5)  # what the reward's very best have of the signal is less than nothing
    assert moving["agreement_change"] == pytest.approx(-0.4)
    assert 0.8 < moving["kl_growth"] < 2.0
    with pytest.raises(ValueError, match="takes 10 steps"):
        pilot_features(rows()[:9], 8)
    with pytest.raises(ValueError, match=r"reward\.watched"):
        pilot_features([{key: value for key, value in row.items() if "focus" not in key} for row in rows()], 8)


def test_the_best_of_normal_numbers():
    assert expected_best(1) == pytest.approx(0.0, abs=1e-9)
    assert expected_best(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_best(8) == pytest.approx(1.4236, abs=1e-4)  # Harter, 1961
    # A term that is called agreement has figures as any other.
    named = [{key.replace("focus", "agreement"): value for key, value in row.items()} for row in rows()]
    assert pilot_features(named, 8) == pytest.approx(pilot_features(rows(), 8))


def test_turning_points_by_hand():
    steps = [0, 3, 6, 9, 12]
    assert turning_step(steps, [0.5, 0.6, 0.7, 0.6, 0.4], 0.05) == 6.0
    assert turning_step(steps, [0.5, 0.6, 0.7, 0.7, 0.72], 0.05) is None
    assert turning_step(steps, [0.8, 0.6, 0.5, 0.4, 0.3], 0.05) == 1.0  # from the start on
    # One bad evaluation is no turn, and a fall that was made good is none either.
    assert turning_step(steps, [0.5, 0.6, 0.2, 0.7, 0.75], 0.05) is None


def test_the_fit_recovers_what_made_its_data():
    draw = np.random.default_rng(0)
    features = [dict(zip(FEATURES, draw.normal(size=len(FEATURES)), strict=True)) for _ in range(400)]
    log_time = np.array([3.5 - 0.8 * one["kl"] + 0.4 * one["agreement"] for one in features]) + 0.2 * draw.normal(
        size=400
    )
    true = np.exp(log_time)
    turned = [float(one) if one < 60 else None for one in true]
    assert 0.2 < np.mean([one is None for one in turned]) < 0.6  # so many have not turned at the end
    found = fit_forecast(features, turned, [60] * 400)
    weights = dict(zip(FEATURES, np.array(found.weights) / np.array(found.deviation), strict=True))
    assert weights["kl"] == pytest.approx(-0.8, abs=0.1)
    assert weights["agreement"] == pytest.approx(0.4, abs=0.1)
    assert max(abs(value) for name, value in weights.items() if name not in ("kl", "agreement")) < 0.1
    assert found.sigma == pytest.approx(0.2, abs=0.05)
    early = found.predict({**dict.fromkeys(FEATURES, 0.0), "kl": 2.0}, 60)
    assert early.step == pytest.approx(math.exp(3.5 - 1.6), rel=0.2)
    assert early.low < early.step < early.high
    assert early.turns
    assert early.chance > 0.95
    late = found.predict({**dict.fromkeys(FEATURES, 0.0), "kl": -2.0}, 60)
    assert not late.turns
    assert late.chance < 0.2
    assert ForecastModel.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="other features"):
        ForecastModel.from_json({**found.to_json(), "features": ["kl"]})
