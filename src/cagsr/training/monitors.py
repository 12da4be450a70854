"""Early warnings: a run that leaves the path is told from its metrics, step by step, before its reward looks good.

What goes wrong first in practice (trl#417, trl#6350, Intuitor#23): the KL explodes, answers
get ever shorter or longer, repeat themselves or all become the same, one term takes over, and the reward rises while
the answers get worse. Each monitor compares one metric with its threshold or with the run's own first step, waits for
``patience`` observations in a row, and speaks once for each excursion.

Metrics read: ``objective/kl`` (nats per sequence), ``response/length`` (tokens), ``response/repetition`` and
``response/ended`` (shares), ``policy/entropy_avg`` (nats per token), ``rewards/<name>/share`` (of the reward's variance),
``eval/metric`` (higher is better) and ``objective/raw_scores`` or ``objective/scores`` (mean reward before the KL penalty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cagsr.config import Action, MonitorConfig
from cagsr.models.stops import hardly_any_end

NEGATIVE_KL = -0.5
"""Mean KL per sequence (nats) below which sampled and scored policy can't be the same: a KL is never negative."""


@dataclass(frozen=True)
class Alert:
    """What a monitor says."""

    name: str
    step: int
    sentence: str
    action: Literal["warn", "stop"]


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


class Monitors:
    """All monitors of a run. Thresholds, actions and patience come from ``MonitorConfig``."""

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._state = _State()

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Look at one step's metrics (absent ones and NaN are skipped) and return what has just gone wrong.

        Args:
            step: the step the metrics belong to.
            metrics: by name, as logged. ``eval/metric`` only in steps that evaluated.

        Returns:
            At most one alert a monitor, and none while an excursion that was reported goes on.
        """
        seen = {name: float(value) for name, value in metrics.items() if value is not None}
        seen = {name: value for name, value in seen.items() if not math.isnan(value)}
        found = [
            self._kl(seen),
            self._negative_kl(seen),
            self._length(seen),
            self._repetition(seen),
            self._ended(seen),
            self._entropy(seen),
            self._dominance(seen),
            self._metric_drop(seen),
        ]
        return [Alert(name, step, sentence, action) for name, sentence, action in found if sentence and action != "off"]

    def state_dict(self) -> dict[str, Any]:
        """Everything the monitors remember, as plain data."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._state = _State(**{**state, "first": dict(state["first"]), "streak": dict(state["streak"])})

    def _fires(self, name: str, outside: bool) -> bool:
        """Count observations in a row outside; True when the count reaches the patience, once."""
        self._state.streak[name] = self._state.streak.get(name, 0) + 1 if outside else 0
        return self._state.streak[name] == max(1, self._config.patience)

    def _with_first(self, seen: Mapping[str, float], metric: str) -> tuple[float, float] | None:
        """Return the metric now and at its first observation."""
        if metric not in seen:
            return None
        return seen[metric], self._state.first.setdefault(metric, seen[metric])

    def _kl(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        kl = seen.get("objective/kl")
        sentence = None
        if kl is not None and self._fires("kl", kl > self._config.kl):
            sentence = (
                f"The policy has moved {kl:.1f} nats per answer away from the starting model (limit "
                f"{self._config.kl:g}): its reward may no longer mean better answers; lower ppo.learning_rate or raise "
                "ppo.kl_coef."
            )
        return "kl", sentence, self._config.kl_action

    def _negative_kl(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        kl = seen.get("objective/kl")
        sentence = None
        if kl is not None and self._fires("negative_kl", kl < NEGATIVE_KL):
            sentence = (
                f"The mean KL is {kl:.2f} nats per answer, and a true KL is never negative: the answers were not "
                "sampled from the policy that is scored; check temperature, top_p, top_k and the precision of "
                "generation."
            )
        # Not an excursion of the policy but a fault in the set-up, so never a reason to stop by itself.
        return "negative_kl", sentence, "off" if self._config.kl_action == "off" else "warn"

    def _length(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        pair = self._with_first(seen, "response/length")
        sentence = None
        if pair is not None:
            length, first = pair
            if self._fires("length_drift", abs(length - first) > self._config.length_drift * first):
                direction = "shorter" if length < first else "longer"
                sentence = (
                    f"Answers have become {direction}: {length:.1f} tokens on average instead of {first:.1f} at the "
                    f"first step; the reward may be paying for {direction} answers."
                )
        return "length_drift", sentence, self._config.length_drift_action

    def _repetition(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        pair = self._with_first(seen, "response/repetition")
        sentence = None
        if pair is not None:
            repetition, first = pair
            if self._fires("repetition", repetition > first + self._config.repetition):
                sentence = (
                    f"Answers repeat themselves: {repetition:.0%} of their n-grams are repeats, {first:.0%} at the "
                    "first step; give reward.repetition.weight a more negative value."
                )
        return "repetition", sentence, self._config.repetition_action

    def _ended(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        share = seen.get("response/ended")
        sentence = None
        if share is not None and self._fires("ended", share < self._config.ended):
            sentence = hardly_any_end(share)
        return "ended", sentence, self._config.ended_action

    def _entropy(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        pair = self._with_first(seen, "policy/entropy_avg")
        sentence = None
        if pair is not None:
            entropy, first = pair
            if self._fires("entropy", entropy < self._config.entropy * first):
                sentence = (
                    f"The policy is collapsing: its entropy is {entropy:.3f} nats per token, {first:.3f} at the first "
                    "step; answers to one prompt become all alike, so raise ppo.kl_coef or ppo.entropy_coef."
                )
        return "entropy", sentence, self._config.entropy_action

    def _dominance(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
        shares = {
            name.removeprefix("rewards/").removesuffix("/share"): value
            for name, value in seen.items()
            if name.startswith("rewards/") and name.endswith("/share")
        }
        sentence = None
        if len(shares) > 1:
            largest = max(shares, key=lambda name: shares[name])
            if self._fires("dominance", shares[largest] > self._config.dominance):
                sentence = (
                    f"The term {largest} makes {shares[largest]:.0%} of the reward's variance (limit "
                    f"{self._config.dominance:.0%}): the other terms hardly count; change the weights if that is not "
                    "intended."
                )
        return "dominance", sentence, self._config.dominance_action

    def _metric_drop(self, seen: Mapping[str, float]) -> tuple[str, str | None, Action]:
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
            return "metric_drop", None, self._config.metric_drop_action
        mean_reward = state.reward_sum / state.reward_count if state.reward_count else None
        state.reward_sum, state.reward_count = 0.0, 0
        if state.best_metric is None or metric >= state.best_metric:
            state.best_metric, state.best_reward = metric, mean_reward
        best, best_reward = state.best_metric, state.best_reward
        fallen = metric < best - self._config.metric_drop * abs(best)
        risen = mean_reward is not None and best_reward is not None and mean_reward > best_reward
        sentence = None
        if self._fires("metric_drop", fallen and risen):
            sentence = (
                f"The reward rises ({best_reward:.3f} to {mean_reward:.3f}) while the held-out metric falls "
                f"({best:.3f} to {metric:.3f}): the policy is exploiting the reward; stop here or take an earlier "
                "checkpoint."
            )
        return "metric_drop", sentence, self._config.metric_drop_action
