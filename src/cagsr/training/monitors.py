"""Early warnings: a run that leaves the path is told from its metrics, step by step, before its reward looks good.

What goes wrong first in practice (trl#417, trl#6350, Intuitor#23): the KL explodes, answers
get ever shorter or longer, repeat themselves or all become the same, one term takes over, and the reward rises while
the answers get worse. Each monitor compares one metric with its threshold or with the run's own first step, waits for
``patience`` observations in a row, and speaks once for each excursion.

Metrics read: ``objective/kl`` (nats per sequence), ``response/length`` (tokens), ``response/repetition`` and
``response/ended`` (shares), ``policy/entropy_avg`` (nats per token), ``rewards/<name>/share`` (of the reward's variance),
``rewards/total/flat`` (share of the prompts whose answers are all worth the same),
``eval/metric`` (higher is better) and ``objective/raw_scores`` or ``objective/scores`` (mean reward before the KL penalty).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any, Literal

import yaml

from cagsr.config import Action, MonitorConfig
from cagsr.models.stops import hardly_any_end
from cagsr.training.forecaster import Forecaster

NEGATIVE_KL = -0.5
"""Mean KL per sequence (nats) below which sampled and scored policy can't be the same: a KL is never negative."""

_SENTENCES: dict[str, str] = yaml.safe_load((files("cagsr.training") / "monitors.yaml").read_text(encoding="utf-8"))
_SHARE = re.compile(r"rewards/(.*)/share")
_Judgement = tuple[str, bool, dict[str, Any]]
"""A monitor's name, whether its metric is outside its threshold, and the values of its sentence."""


@dataclass(frozen=True)
class Alert:
    """What a monitor says."""

    name: str
    step: int
    sentence: str
    action: Literal["note", "warn", "stop", "end"]
    """``stop`` breaks a run off, ``end`` is that of one that is done early."""


@dataclass
class _State:
    """What the monitors remember; saved with each checkpoint."""

    first: dict[str, float] = field(default_factory=dict)
    """The first value of each metric that is compared with its start."""
    streak: dict[str, int] = field(default_factory=dict)
    """Observations in a row outside the threshold, by monitor."""
    best_metric: float | None = None
    best_reward: float | None = None
    """Mean reward in the steps before the best evaluation."""
    reward_sum: float = 0.0
    reward_count: int = 0
    """Rewards since the last evaluation."""
    pilot: list[Mapping[str, float]] = field(default_factory=list)
    """What a forecast reads of the first steps."""


class Monitors:
    """All monitors of a run. Thresholds, actions and patience come from ``MonitorConfig``; ``forecaster`` is that of its run."""

    def __init__(self, config: MonitorConfig, forecaster: Forecaster | None = None) -> None:
        self._config, self._forecaster = config, forecaster
        self._state = _State()

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Look at one step's metrics (absent ones and NaN are skipped) and return what has just gone wrong.

        ``metrics`` are those logged, ``eval/metric`` only in steps that evaluated. At most one alert a monitor, and none
        while an excursion that was reported goes on.
        """
        seen = {name: float(value) for name, value in metrics.items() if value is not None}
        seen = {name: value for name, value in seen.items() if not math.isnan(value)}
        alerts, streak, config = [], self._state.streak, self._config
        for name, outside, told in (*self._compared(seen), *self._metric_drop(seen)):
            streak[name] = streak.get(name, 0) + 1 if outside else 0
            action: Action = getattr(config, "kl_action" if name == "negative_kl" else f"{name}_action")
            if streak[name] == max(1, config.patience) and action != "off":
                # A negative KL is no excursion of the policy but a fault in the set-up, so never a reason to stop by itself.
                action = "warn" if name == "negative_kl" else action
                alerts.append(Alert(name, step, _SENTENCES[name].format(config=config, **told), action))
        return alerts + self._forecast(step, seen)

    def last_step(self, planned: int) -> int:
        """The run's last step, as far as is known by now: ``planned``, or where the forecast ends it."""
        return planned if self._forecaster is None else self._forecaster.last(self._state.pilot)

    def state_dict(self) -> dict[str, Any]:
        """Everything the monitors remember, as plain data."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        copied = {"first": dict(state["first"]), "streak": dict(state["streak"]), "pilot": list(state.get("pilot", []))}
        self._state = _State(**{**state, **copied})

    def _forecast(self, step: int, seen: Mapping[str, float]) -> list[Alert]:
        """What the first steps say of the later ones, once there are enough."""
        if self._forecaster is None or step == 0:
            return []
        before = len(self._state.pilot)
        try:
            self._state.pilot = self._forecaster.kept(self._state.pilot, seen)
        except ValueError as error:
            if step > 1:
                return []
            return [Alert("forecast", step, f"No forecast can be made: {error}.", "warn")]
        pilot = self._state.pilot
        found = self._forecaster.forecast(pilot)
        if found is None:
            return []
        if len(pilot) > before:
            return [Alert("forecast", step, self._forecaster.sentence(pilot), "warn" if found.turns else "note")]
        if step == self._forecaster.last(pilot) < self._forecaster.horizon:
            return [Alert("forecast", step, "The run ends here: from about this step on its reward hurts.", "end")]
        return []

    def _compared(self, seen: Mapping[str, float]) -> Iterator[_Judgement]:
        """Each metric against its threshold, or against the run's first value of it."""
        config, start = self._config, self._state.first
        if (kl := seen.get("objective/kl")) is not None:
            yield "kl", kl > config.kl, {"kl": kl}
            yield "negative_kl", kl < NEGATIVE_KL, {"kl": kl}
        if (now := seen.get("response/length")) is not None:
            first = start.setdefault("response/length", now)
            told = {"now": now, "first": first, "direction": "shorter" if now < first else "longer"}
            yield "length_drift", abs(now - first) > config.length_drift * first, told
        if (now := seen.get("response/repetition")) is not None:
            first = start.setdefault("response/repetition", now)
            yield "repetition", now > first + config.repetition, {"now": now, "first": first}
        if (now := seen.get("response/ended")) is not None:
            yield "ended", now < config.ended, {"sentence": hardly_any_end(now)}
        if (now := seen.get("policy/entropy_avg")) is not None:
            first = start.setdefault("policy/entropy_avg", now)
            yield "entropy", now < config.entropy * first, {"now": now, "first": first}
        shares = {match[1]: value for name, value in seen.items() if (match := _SHARE.fullmatch(name))}
        if len(shares) > 1:
            largest = max(shares, key=lambda name: shares[name])
            yield "dominance", shares[largest] > config.dominance, {"largest": largest, "share": shares[largest]}

        if (flat := seen.get("rewards/total/flat")) is not None:
            yield "flat", flat > config.flat, {"flat": flat}

    def _metric_drop(self, seen: Mapping[str, float]) -> Iterator[_Judgement]:
        """Reward up while the held-out metric falls: over-optimisation.

        The reward of one step is noisy, so its mean since the last evaluation is compared with the mean before the
        best evaluation.
        """
        state = self._state
        reward = seen.get("objective/raw_scores", seen.get("objective/scores"))
        if reward is not None:
            if state.best_metric is not None and state.best_reward is None:
                state.best_reward = reward  # the model was evaluated before its first step: this is its reward
            state.reward_sum += reward
            state.reward_count += 1
        metric = seen.get("eval/metric")
        if metric is None:
            return
        mean_reward = state.reward_sum / state.reward_count if state.reward_count else None
        state.reward_sum, state.reward_count = 0.0, 0
        if state.best_metric is None or metric >= state.best_metric:
            state.best_metric, state.best_reward = metric, mean_reward
        best, best_reward = state.best_metric, state.best_reward
        fallen = metric < best - self._config.metric_drop * abs(best)
        risen = mean_reward is not None and best_reward is not None and mean_reward > best_reward
        told = {"best_reward": best_reward, "reward": mean_reward, "best": best, "metric": metric}
        yield "metric_drop", fallen and risen, told
