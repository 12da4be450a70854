"""When will this reward begin to hurt? Read off the first steps of a run, before its curves turn.

Every intrinsic reward rises and then falls (URLVR, arXiv 2603.08660; "No Free Lunch", arXiv 2506.17219). How soon depends on how
fast the policy moves (KL), on what the reward pays for beside what it should (length, likelihood, repetition), and on whether
signals that it does not pay agree with it, and go on agreeing (Gao et al., 2023: the gap between proxy and truth grows with KL).
These are features of a pilot of ``PILOT`` steps; a log-normal accelerated failure time model, fitted on runs whose truth is
known (``examples/forecast``), makes a step of them. Runs that had not turned when they ended say that they turn later
(censoring).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm

PILOT = 10
"""Steps that the features are read from."""
FEATURES = (
    *("kl", "kl_growth", "entropy_change", "length_change", "repetition_change"),
    *("length_correlation", "likelihood_correlation", "repetition_correlation"),
    *("agreement", "agreement_change", "tail", "kl_coef"),
)
"""In the order of a model's weights."""

SECOND_OPINIONS = ("lexical_support", "grounded_coverage", "coverage", "self_certainty", "echo", "focus")
"""The terms that the shipped model's runs watched; of a run's own, those that it does not pay."""
_METRICS = (
    *("objective/kl", "policy/entropy_avg", "response/length", "response/repetition", "kl_coef"),
    *(f"rewards/total/{what}_correlation" for what in ("length", "likelihood", "repetition")),
)
_WATCHED = re.compile(r"rewards/.*/(agreement|gain_2|gain_all)")

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Forecast:
    """When a run turns."""

    step: float
    """The median."""
    low: float
    """Of the central 80 %."""
    high: float
    chance: float
    """That it turns before its horizon."""
    horizon: int
    """Steps that the run is to have."""

    @property
    def turns(self) -> bool:
        """Whether it is expected to turn before its horizon."""
        return self.step < self.horizon

    @property
    def has_turned(self) -> bool:
        """Whether it is expected to have turned within the pilot already."""
        return self.step <= PILOT


@dataclass(frozen=True)
class LeashForecast:
    """What a pilot under one leash says."""

    kl_coef: float
    forecast: Forecast
    kl: float
    """Nats an answer that the policy will be away from its start where it turns, or at the horizon."""


@dataclass(frozen=True)
class ForecastModel:
    """``log step = intercept + weights . (features - mean) / deviation + sigma * normal``."""

    intercept: float
    weights: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    sigma: float

    def predict(self, features: Mapping[str, float], horizon: int) -> Forecast:
        """Forecast a run with these features that is to have ``horizon`` steps."""
        z = (np.array([features[name] for name in FEATURES]) - self.mean) / self.deviation
        # A pilot unlike any that the model knows is told as the nearest one.
        middle = self.intercept + float(np.clip(z, -3.0, 3.0) @ np.array(self.weights))
        spread = self.sigma * float(norm.ppf(0.9))
        chance = float(norm.cdf((math.log(max(horizon, 1)) - middle) / self.sigma))
        return Forecast(math.exp(middle), math.exp(middle - spread), math.exp(middle + spread), chance, horizon)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        parts = {name: [float(one) for one in getattr(self, name)] for name in ("weights", "mean", "deviation")}
        return {"features": list(FEATURES), "intercept": self.intercept, "sigma": self.sigma, **parts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ForecastModel:
        """Read what :meth:`to_json` gave; ValueError for a model of other features."""
        if tuple(value["features"]) != FEATURES:
            raise ValueError("a forecast of other features")
        weights, mean, deviation = (
            tuple(float(one) for one in value[name]) for name in ("weights", "mean", "deviation")
        )
        return cls(float(value["intercept"]), weights, mean, deviation, float(value["sigma"]))


def shipped() -> ForecastModel:
    """The model that ``examples/forecast`` fitted."""
    text = (files("cagsr.diagnosis") / "forecast.json").read_text(encoding="utf-8")
    return ForecastModel.from_json(json.loads(text))


def pilot_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of a step's metrics those that a forecast reads; ValueError where one of them is not there."""
    if missing := [name for name in _METRICS if name not in metrics]:
        raise ValueError(f"the run does not log {missing[0]}")
    return {name: float(value) for name, value in metrics.items() if name in _METRICS or _WATCHED.fullmatch(name)}


def kl_at(rows: Rows, step: float) -> float:
    """The KL (nats an answer) that a run will have at a step, by the power of the step at which it grew so far."""
    kl = np.log(np.array([max(row["objective/kl"], 0.0) for row in rows]) + 0.1)
    slope, intercept = np.polyfit(np.log(np.arange(1, len(kl) + 1)), kl, 1)
    return float(max(math.exp(intercept + slope * math.log(max(step, 1.0))) - 0.1, 0.0))


def pilot_features(rows: Rows, generations: int, pilot: int = PILOT) -> dict[str, float]:
    """What the first ``pilot`` steps of a run say, by the names of ``FEATURES``; ``rows`` are its metrics from step 1 on.

    ``kl``: log of the mean KL (nats an answer, plus 0.1) of the last third; ``kl_growth``: by what power of the step it grows. The
    ``_change`` of a metric is its mean over the last third less that over the first, relative to the first for entropy and
    length. Correlations are of the reward with an answer's length, with its likelihood under the starting model and with its
    repetition, within prompts. ``agreement``: mean correlation of the reward with what is watched and not paid; ``tail``: how
    much more of that the best of all ``generations`` answers to a prompt has than the best of two, over what a normal signal
    would have (1: no tail, below 0: it turns back). ``kl_coef``: the log of the leash. ValueError: fewer steps, or nothing
    watched.
    """
    steps = list(rows[:pilot])
    if len(steps) < pilot:
        raise ValueError(f"a forecast takes {pilot} steps, and there are {len(steps)}")
    third = max(1, pilot // 3)

    def early(name: str) -> float:
        return float(np.mean([row[name] for row in steps[:third]]))

    def late(name: str) -> float:
        return float(np.mean([row[name] for row in steps[-third:]]))

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in steps]))

    kl = np.log(np.array([max(row["objective/kl"], 0.0) for row in steps]) + 0.1)
    at = np.log(np.arange(1, pilot + 1))
    watched = sorted(name for name in steps[0] if name.startswith("rewards/") and name.endswith("/agreement"))
    if not watched:
        raise ValueError("a forecast needs terms that are watched and not paid (reward.watched)")
    tails = []
    for name in watched:
        term = name.removesuffix("agreement")
        two, everyone = mean(f"{term}gain_2"), mean(f"{term}gain_all")
        if abs(two) > 0.02:
            tails.append(float(np.clip(everyone / two / (expected_best(generations) / expected_best(2)), -2.0, 2.0)))
    agreement = [mean(name) for name in watched]
    return {
        "kl": math.log(max(late("objective/kl"), 0.0) + 0.1),
        "kl_growth": float(np.polyfit(at, kl, 1)[0]),
        "entropy_change": late("policy/entropy_avg") / max(early("policy/entropy_avg"), 1e-6) - 1.0,
        "length_change": late("response/length") / max(early("response/length"), 1e-6) - 1.0,
        "repetition_change": late("response/repetition") - early("response/repetition"),
        "length_correlation": mean("rewards/total/length_correlation"),
        "likelihood_correlation": mean("rewards/total/likelihood_correlation"),
        "repetition_correlation": mean("rewards/total/repetition_correlation"),
        "agreement": float(np.mean(agreement)),
        "agreement_change": float(np.mean([late(name) - early(name) for name in watched])),
        "tail": float(np.mean(tails)) if tails else 1.0,
        "kl_coef": math.log(max(mean("kl_coef"), 1e-4)),
    }


@cache
def expected_best(n: int) -> float:
    """How far above the mean the best of ``n`` normal numbers is, in standard deviations.

    ``integral of z n phi(z) Phi(z)^(n - 1)``.
    """
    found, _ = quad(lambda z: z * n * norm.pdf(z) * norm.cdf(z) ** (n - 1), -10.0, 10.0)
    return float(found)


def turning_step(steps: Sequence[int], truth: Sequence[float], drop: float) -> float | None:
    """The step at which a curve of the truth begins to fall for good; None where it has not by the end.

    The curve is smoothed over three evaluations; it has turned where it ends at least ``drop`` below its highest point. A
    curve that falls from the start on turned at step 1.
    """
    values = np.asarray(truth, dtype=float)
    padded = np.concatenate([values[:1], values, values[-1:]])
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    peak = int(np.argmax(smooth))
    if smooth[peak] - smooth[-1] < drop:
        return None
    return float(max(steps[peak], 1))


def fit_forecast(
    features: Sequence[Mapping[str, float]], turned: Sequence[float | None], horizon: Sequence[int], ridge: float = 1.0
) -> ForecastModel:
    """Fit the model by maximum likelihood; ``turned`` is the step of each run, None where it had not turned at its ``horizon``.

    Of a run that turned within the pilot no more is asked than that: nothing is left to forecast.
    """
    x = np.array([[one[name] for name in FEATURES] for one in features])
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    z = np.clip((x - mean) / deviation, -3.0, 3.0)
    seen = np.array([one is not None for one in turned])
    known = [float(end) if one is None else one for one, end in zip(turned, horizon, strict=True)]
    within = seen & (np.array(known) <= PILOT)
    log_time = np.log(np.maximum(known, PILOT))

    def loss(parameters: NDArray[np.float64]) -> float:
        intercept, log_sigma, weights = parameters[0], parameters[1], parameters[2:]
        sigma = math.exp(log_sigma)
        error = (log_time - intercept - z @ weights) / sigma
        likelihood = np.where(
            within, norm.logcdf(error), np.where(seen, norm.logpdf(error) - log_sigma, norm.logsf(error))
        ).sum()
        return float(-likelihood + ridge * (weights @ weights))

    start = np.concatenate([[float(log_time.mean()), 0.0], np.zeros(len(FEATURES))])
    bounds = [(None, None), (math.log(0.1), math.log(5.0)), *[(None, None)] * len(FEATURES)]
    found = minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    return ForecastModel(
        float(found[0]), tuple(found[2:].tolist()), tuple(mean.tolist()), tuple(deviation.tolist()), math.exp(found[1])
    )
