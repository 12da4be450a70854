"""The forecast at work: what is watched for it, what a run that is forecast says, where it ends, and pilots of ``diagnose``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, ModelConfig, MonitorConfig, RewardConfig, RunConfig, TrainConfig
from cagsr.diagnosis.forecast import FEATURES, PILOT, SECOND_OPINIONS, ForecastModel, kl_at, pilot_features, shipped
from cagsr.errors import ConfigError
from cagsr.run_page.read_run import read_run
from cagsr.training.forecaster import Forecaster, forecast_sentence, watching
from cagsr.training.monitors import Monitors
from test_diagnosis_forecast import rows


def always(step: float) -> ForecastModel:
    """One that says the same of every run."""
    none = (0.0,) * len(FEATURES)
    return ForecastModel(math.log(step), none, none, (1.0,) * len(FEATURES), 0.2)


def of(action: str, steps: int = 40) -> TrainConfig:
    return TrainConfig(
        ModelConfig("m"),
        DataConfig("d"),
        "run",
        run=RunConfig(steps=steps),
        monitors=MonitorConfig(forecast_action=action),  # type: ignore[arg-type]
        reward=RewardConfig(watched=["faithfulness"]),
    )


def test_what_a_run_does_not_pay_is_watched():
    assert watching(of("off")) == of("off")
    found = watching(of("warn")).reward
    paid = {name for name in SECOND_OPINIONS if RewardConfig().asks(name)}
    assert found.watched == ["faithfulness", *(name for name in SECOND_OPINIONS if name not in paid)]
    assert paid  # the default pays some
    with pytest.raises(ConfigError, match="first 10 steps, and the run has 10"):
        watching(of("stop", PILOT))


def test_the_shipped_model_reads_the_features_of_today():
    found = shipped().predict(pilot_features(rows(), 8), 60)
    assert 0.0 < found.low < found.step < found.high


def test_a_turn_within_the_pilot_is_said_without_a_step():
    found = always(4.0).predict(pilot_features(rows(), 8), 60)
    assert found.has_turned
    assert forecast_sentence(found, rows()) == "Forecast: by its first 10 steps this reward hurts already."


def test_the_kl_there_by_hand():
    # 0.5 s - 0.1 nats: a power of one of the step.
    rising = [{"objective/kl": 0.5 * step - 0.1} for step in range(1, 11)]
    assert kl_at(rising, 20.0) == pytest.approx(9.9)
    assert kl_at([{"objective/kl": 3.0}] * 10, 40.0) == pytest.approx(3.0)


def test_monitors_say_it_once_and_end_the_run(monkeypatch: pytest.MonkeyPatch):
    stops = Monitors(MonitorConfig(patience=99), Forecaster(40, 8, True, always(25.6)))
    said = [(alert.step, alert.action) for step in range(1, 26) for alert in stops.observe(step, rows()[0])]
    assert said == [(10, "warn"), (25, "end")]
    assert stops.last_step(40) == 25
    # A run that goes on from a checkpoint knows it too, with a pilot that was cut in two.
    first, second = (Monitors(MonitorConfig(patience=99), Forecaster(40, 8, True, always(25.6))) for _ in range(2))
    for step in range(1, 8):
        assert first.observe(step, rows()[0]) == []
    assert first.last_step(40) == 40  # nothing is known yet
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    told = [alert for step in range(8, 11) for alert in second.observe(step, rows()[0])]
    assert [alert.step for alert in told] == [10]
    assert "about step 26 of 40" in told[0].sentence
    assert "ends at step 25" in told[0].sentence
    # One that only warns goes on, one that turns later than it ends says so, and a turn within the pilot ends it right after.
    assert Monitors(MonitorConfig(), Forecaster(40, 8, False, always(25.6))).last_step(40) == 40
    late = Monitors(MonitorConfig(patience=99), Forecaster(40, 8, True, always(80.0)))
    (alert,) = [alert for step in range(1, 41) for alert in late.observe(step, rows()[0])]
    assert (alert.step, alert.action, late.last_step(40)) == (10, "note", 40)
    assert "not expected to hurt within 40 steps (chance that it does: 0%)" in alert.sentence
    early = Monitors(MonitorConfig(patience=99), Forecaster(40, 8, True, always(3.0)))
    for step in range(1, 11):
        early.observe(step, rows()[0])
    assert early.last_step(40) == 11
    # Nothing is made up where a metric is missing.
    lacking = {key: value for key, value in rows()[0].items() if key != "response/length"}
    without = Monitors(MonitorConfig(patience=99), Forecaster(40, 8, True, always(3.0)))
    (alert,) = [alert for step in range(1, 41) for alert in without.observe(step, lacking)]
    assert "does not log response/length" in alert.sentence
    assert without.last_step(40) == 40


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def test_a_run_ends_where_its_forecast_says(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("cagsr.training.forecaster.shipped", lambda: always(12.4))
    data, run = tiny.save_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run"
    argv = ["train", "--model", str(start), "--data", str(data), "--output_dir", str(run), "--model.device", "cpu"]
    argv += ["--run.batch_size", "2", "--num_generations", "2", "--max_new_tokens", "4", "--steps", "20"]
    argv += ["--evaluation.held_out", "2", "--evaluation.every", "4", "--run.save_every", "8"]
    assert main([*argv, "--monitors.forecast_action", "stop"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "step 10: Forecast: by its first 10 steps this reward begins to hurt at about step 12 of 20" in told
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(13))
    assert "eval/metric_greedy" in metrics[-1]
    assert "rewards/lexical_support/agreement" in metrics[-1]
    best = max((row for row in metrics if "eval/metric_greedy" in row), key=lambda row: row["eval/metric_greedy"])
    assert [path.name for path in (run / "best").iterdir()] == [f"step-{best['step']:06d}"]
    assert f"{best['step']} steps" in (run / "final" / "README.md").read_text()
    assert read_run(run, "run").state.kind == "finished"
    # Done is done: a resumed run takes no step more.
    assert main([*argv, "--monitors.forecast_action", "stop", "--resume"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 13


def test_diagnose_trains_pilots(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("cagsr.training.forecaster.shipped", lambda: always(30.0))
    data, output = tiny.save_prompts(tmp_path / "prompts.jsonl", 8), tmp_path / "diagnosis.json"
    argv = ["diagnose", "--model", str(start), "--data", str(data), "--model.device", "cpu", "--num_prompts", "4"]
    argv += ["--num_generations", "2", "--max_new_tokens", "4", "--attacked_prompts", "0", "--output", str(output)]
    argv += ["--pilot.kl_coefs", "0.01", "0.3", "--pilot.batch_size", "2"]
    assert main([*argv, "--pilot.steps", "100"]) == 0
    assert "Forecast of 100 steps by pilots of 10" in capsys.readouterr().out
    found = json.loads(output.read_text())["forecasts"]
    assert [one["kl_coef"] for one in found] == [0.01, 0.3]
    assert [one["forecast"]["step"] for one in found] == pytest.approx([30.0, 30.0])
    assert [one["forecast"]["horizon"] for one in found] == [100, 100]
    assert main([*argv, "--pilot.steps", "10"]) == 2
    assert "give more than 10" in capsys.readouterr().err
