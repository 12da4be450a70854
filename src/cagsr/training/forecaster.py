"""The forecast of the turn while a run goes on: from its first steps, at which step its reward will begin to hurt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cagsr.config import TrainConfig
from cagsr.diagnosis.forecast import (
    PILOT,
    SECOND_OPINIONS,
    Forecast,
    ForecastModel,
    kl_at,
    pilot_features,
    pilot_metrics,
    shipped,
)
from cagsr.errors import ConfigError

Pilot = Sequence[Mapping[str, float]]
"""The metrics of a run's first steps that a forecast reads."""


def watching(config: TrainConfig) -> TrainConfig:
    """A run that is to be forecast watches the second opinions that it does not pay; any other stays as it is.

    ConfigError where it is over before a forecast can be made.
    """
    if config.monitors.forecast_action == "off":
        return config
    if config.run.steps <= PILOT:
        raise ConfigError(
            f"--monitors.forecast_action {config.monitors.forecast_action}: the forecast is read from the first {PILOT} steps, "
            f"and the run has {config.run.steps}; give --run.steps more, or leave the forecast out."
        )
    reward = config.reward
    added = [name for name in SECOND_OPINIONS if not reward.asks(name)]
    return dataclasses.replace(config, reward=dataclasses.replace(reward, watched=[*reward.watched, *added]))


@dataclass(frozen=True)
class Forecaster:
    """Forecasts a run of ``horizon`` steps with ``generations`` answers to a prompt."""

    horizon: int
    generations: int
    stops: bool
    """Whether the run is to end where it turns."""
    model: ForecastModel

    @classmethod
    def of(cls, config: TrainConfig) -> Forecaster | None:
        """That of a run; None where it asks for none."""
        action = config.monitors.forecast_action
        if action == "off":
            return None
        return cls(config.run.steps, config.sampling.num_generations, action == "stop", shipped())

    def kept(self, pilot: Pilot, metrics: Mapping[str, float]) -> list[Mapping[str, float]]:
        """The pilot with this step, as long as it is not full. Raises ValueError as ``pilot_metrics``."""
        return [*pilot, pilot_metrics(metrics)] if len(pilot) < PILOT else list(pilot)

    def forecast(self, pilot: Pilot) -> Forecast | None:
        """What the first steps say; None before there are enough."""
        if len(pilot) < PILOT:
            return None
        return self.model.predict(pilot_features(pilot, self.generations), self.horizon)

    def last(self, pilot: Pilot) -> int:
        """The last step of the run."""
        found = self.forecast(pilot) if self.stops else None
        if found is None or not found.turns:
            return self.horizon
        return min(self.horizon, max(PILOT + 1, math.floor(found.step)))

    def sentence(self, pilot: Pilot) -> str:
        """What is said once the pilot is full."""
        found, last = self.forecast(pilot), self.last(pilot)
        assert found is not None
        if not found.turns:
            return forecast_sentence(found, pilot)
        if last < self.horizon:
            what = f"the run ends at step {last}, and final/ will be the policy of the best evaluation."
        else:
            what = "hold the policy nearer (--ppo.kl_coef), or end there (--monitors.forecast_action stop)."
        return f"{forecast_sentence(found, pilot).removesuffix('.')}; {what}"


def forecast_sentence(found: Forecast, pilot: Pilot) -> str:
    """When the reward of a pilot is expected to turn, with the KL that it will have come to."""
    if not found.turns:
        return (
            f"Forecast: by its first {PILOT} steps this reward is not expected to hurt within {found.horizon} steps (chance that "
            f"it does: {found.chance:.0%})."
        )
    if found.has_turned:
        return f"Forecast: by its first {PILOT} steps this reward hurts already."
    return (
        f"Forecast: by its first {PILOT} steps this reward begins to hurt at about step {found.step:.0f} of {found.horizon} (80 %: "
        f"{found.low:.0f} to {found.high:.0f}), at a KL of about {kl_at(pilot, found.step):.1f} nats an answer."
    )
