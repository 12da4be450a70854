"""Monitors on hand-made series: they fire when they should, once, and go on after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagsr.config import MonitorConfig
from cagsr.training.monitors import Monitors


def fired(monitors: Monitors, series: Iterable[Mapping[str, float]], start: int = 0) -> list[tuple[int, str]]:
    return [(alert.step, alert.name) for step, row in enumerate(series, start) for alert in monitors.observe(step, row)]


def of(name: str, values: Iterable[float]) -> list[dict[str, float]]:
    return [{name: value} for value in values]


def test_kl_needs_patience_and_fires_once_an_excursion() -> None:
    monitors = Monitors(MonitorConfig(kl=10, patience=2))
    series = of("objective/kl", [0, 11, 9, 11, 12, 13, 14, 2, 11, 11, 11])
    assert fired(monitors, series) == [(4, "kl"), (9, "kl")]


@pytest.mark.parametrize(
    ("metric", "name", "config", "start", "inside", "outside"),
    [
        ("response/length", "length_drift", {"length_drift": 0.5}, 20, 29.9, 30.1),
        ("response/length", "length_drift", {"length_drift": 0.5}, 20, 10.1, 9.9),
        ("response/repetition", "repetition", {"repetition": 0.2}, 0.1, 0.29, 0.31),
        ("response/ended", "ended", {}, 0.9, 0.11, 0.09),
        ("policy/entropy_avg", "entropy", {"entropy": 0.3}, 2.0, 0.61, 0.59),
        ("objective/kl", "kl", {"kl": 20.0}, 0, 19.9, 20.1),
        ("rewards/total/flat", "flat", {"flat": 0.9}, 0, 0.89, 0.91),
        ("objective/kl", "negative_kl", {}, 0, -0.49, -0.51),
    ],
)
def test_thresholds(
    metric: str, name: str, config: dict[str, float], start: float, inside: float, outside: float
) -> None:
    monitors = Monitors(MonitorConfig(**config, patience=1))  # type: ignore[arg-type]
    assert fired(monitors, of(metric, [start, inside, inside, outside])) == [(3, name)]


def test_lengths_say_which_way() -> None:
    for value, word in ((5, "shorter"), (50, "longer")):
        monitors = Monitors(MonitorConfig(patience=1))
        monitors.observe(0, {"response/length": 20})
        (alert,) = monitors.observe(1, {"response/length": value})
        assert word in alert.sentence
        assert "20.0" in alert.sentence


def test_dominance_needs_several_terms_and_names_the_largest() -> None:
    one = {"rewards/coverage/share": 1.0}
    assert fired(Monitors(MonitorConfig(patience=1)), [one] * 5) == []
    both = {"rewards/coverage/share": 0.05, "rewards/repetition/share": 0.95}
    (alert,) = Monitors(MonitorConfig(patience=1)).observe(0, both)
    assert alert.name == "dominance"
    assert "term repetition makes 95%" in alert.sentence


def test_reward_up_while_the_metric_falls() -> None:
    monitors = Monitors(MonitorConfig(patience=2, metric_drop=0.05))
    series: list[dict[str, float]] = [{"eval/metric": 0.7}]  # before the first step: no reward yet
    for reward, metric in [(0.1, 0.72), (0.2, 0.66), (0.3, 0.65), (0.4, 0.6)]:
        series += [{"objective/raw_scores": reward, "objective/scores": 0.0} for _ in range(4)]
        series.append({"objective/raw_scores": reward, "eval/metric": metric})
    # The best is 0.72 at reward 0.1; below 0.684 with more reward at indices 10 and 15: the second one fires.
    assert fired(monitors, series) == [(15, "metric_drop")]


def test_a_falling_metric_with_a_falling_reward_is_another_trouble() -> None:
    monitors = Monitors(MonitorConfig(patience=1))
    series = [{"objective/scores": reward, "eval/metric": metric} for reward, metric in [(0.5, 0.7), (0.4, 0.5)]]
    assert fired(monitors, series) == []
    assert fired(monitors, [{"objective/scores": 0.6, "eval/metric": 0.5}], start=2) == [(2, "metric_drop")]


def test_the_start_is_the_reward_of_a_model_evaluated_before_its_first_step() -> None:
    monitors = Monitors(MonitorConfig(patience=1))
    series: list[dict[str, float]] = [{"eval/metric": 0.7}, {"objective/scores": 0.3}, {"objective/scores": 0.9}]
    series.append({"eval/metric": 0.5})  # mean 0.6 since the start is above the first 0.3
    assert fired(monitors, series) == [(3, "metric_drop")]


def test_noise_in_the_reward_of_single_steps_does_not_count() -> None:
    monitors = Monitors(MonitorConfig(patience=1))
    rewards = [0.5, 0.5, 0.5, 0.2, 0.9, 0.3]  # means 0.5 and 0.467: not risen, although one step was 0.9
    series = [{"objective/scores": reward} for reward in rewards]
    series[2]["eval/metric"] = 0.7
    series[5]["eval/metric"] = 0.5
    assert fired(monitors, series) == []


def test_a_negative_metric_falls_downwards() -> None:
    monitors = Monitors(MonitorConfig(patience=1))
    rows = [{"objective/scores": 0.1, "eval/metric": -2.0}, {"objective/scores": 0.2, "eval/metric": -2.05}]
    assert fired(monitors, rows) == []
    assert fired(monitors, [{"objective/scores": 0.2, "eval/metric": -2.2}]) == [(0, "metric_drop")]


def test_absent_and_undefined_metrics_are_skipped() -> None:
    monitors = Monitors(MonitorConfig(kl=10, patience=3))
    series: list[dict[str, float]] = [{"objective/kl": 11}, {}, {"objective/kl": math.nan}, {"objective/kl": 11}]
    assert fired(monitors, series) == []
    assert fired(monitors, [{"objective/kl": 11}]) == [(0, "kl")]
    infinite = Monitors(MonitorConfig(patience=1))
    assert fired(infinite, of("objective/kl", [math.inf])) == [(0, "kl")]


def test_actions() -> None:
    off = Monitors(MonitorConfig(kl_action="off", patience=1))
    assert fired(off, of("objective/kl", [100, -100])) == []
    stop = Monitors(MonitorConfig(kl_action="stop", patience=1))
    alerts = stop.observe(7, {"objective/kl": 100})
    assert [alert.action for alert in alerts] == ["stop"]
    assert alerts[0].sentence.startswith("The policy has moved 100.0 nats")
    (negative,) = stop.observe(8, {"objective/kl": -1})
    assert negative.action == "warn"  # a fault of the set-up, not of the policy


ROWS = st.fixed_dictionaries(
    {},
    optional={
        name: st.floats(-5, 40)
        for name in (
            "objective/kl",
            "response/length",
            "response/repetition",
            "policy/entropy_avg",
            "rewards/a/share",
            "rewards/b/share",
            "objective/scores",
            "eval/metric",
        )
    },
)


@given(st.lists(ROWS, max_size=12), st.integers(0, 12))
def test_a_resumed_run_hears_what_the_uninterrupted_one_hears(rows: list[dict[str, float]], cut: int) -> None:
    config = MonitorConfig(patience=2)
    whole = fired(Monitors(config), rows)
    first, second = Monitors(config), Monitors(config)
    begun = fired(first, rows[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + fired(second, rows[cut:], start=len(rows[:cut])) == whole
