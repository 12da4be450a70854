"""Ten steps of a run that nobody has decided on yet, under each leash: when would its reward begin to hurt?"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from cagsr.config import TrainConfig
from cagsr.diagnosis.forecast import PILOT, LeashForecast, kl_at
from cagsr.runs.lines import read_lines
from cagsr.support.progress import each
from cagsr.train import train
from cagsr.training.forecaster import Forecaster, watching


def forecast_leashes(config: TrainConfig, kl_coefs: Sequence[float]) -> tuple[LeashForecast, ...]:
    """Train the first steps of ``config`` under each KL coefficient, in a folder that is removed, and forecast all its steps.

    Raises CagsrError as ``train`` does.
    """
    watched = watching(replace(config, monitors=replace(config.monitors, forecast_action="warn")))
    forecaster = Forecaster.of(watched)
    assert forecaster is not None
    found = []
    for kl_coef in each("pilots", list(kl_coefs), "pilots"):
        with TemporaryDirectory(prefix="cagsr-pilot-") as folder:
            run = Path(folder) / "run"
            pilot = replace(
                watched,
                output_dir=str(run),
                ppo=replace(watched.ppo, kl_coef=kl_coef),
                # Of what a run does beside its steps a pilot needs nothing.
                monitors=replace(watched.monitors, forecast_action="off"),
                evaluation=replace(watched.evaluation, path=None, held_out=0),
                run=replace(watched.run, steps=PILOT, save_every=0, sample_rows=0),
            )
            train(pilot, console=Console(file=io.StringIO()))
            rows = [row for row in read_lines(run / "metrics.jsonl") if row["step"] > 0]
        forecast = forecaster.forecast(rows)
        assert forecast is not None
        found.append(LeashForecast(kl_coef, forecast, kl_at(rows, min(forecast.step, forecast.horizon))))
    return tuple(found)
