"""The forecast's example: which runs are made, and a table of runs made up so that the forecast must see their turn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from examples.forecast import runs as making
from examples.forecast import table
from examples.forecast.truth import net_facts

from cagsr.commands.main import main
from cagsr.config import DataConfig, ModelConfig, TrainConfig, validate
from cagsr.errors import DataError
from cagsr.parse import parse_command
from test_diagnosis_forecast import rows


def test_every_reward_under_every_leash(tmp_path: Path):
    plan = yaml.safe_load(making.PLAN.read_text())
    found = dict(making.runs_of(plan, 2))
    assert len(found) == 2 * len(plan["rewards"]) * len(plan["leashes"])
    settings = found["recommended-tight-1"]
    assert settings["ppo"]["kl_coef"] == 0.2
    assert settings["run"]["seed"] == 1
    assert settings["reward"]["associated_coverage"] == {"weight": 0.85}
    assert "grounded_coverage" not in settings["reward"]["watched"]  # it is paid
    assert "grounded_coverage" in found["coverage-tight-1"]["reward"]["watched"]
    assert found["coverage-tight-1"]["reward"]["grounded_coverage"] == {"weight": 0.0}
    for name, one in found.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**one, "model": {"path": "m"}, "data": {"path": "d"}, "output_dir": "o"}))
        config: TrainConfig = parse_command(TrainConfig, ["--config", str(path)], prog="train")
        validate(config)
        assert (config.model, config.data) == (ModelConfig("m"), DataConfig("d"))
    assert main(["train", "--help"]) == 0


def test_net_facts_of_the_quickstart() -> None:
    prompt = "Tell us who this is. name: Jakob; hobby: knitting; job: painter; city: Prague."
    answers = ["Jakob is a painter and is fond of knitting.", "Jakob is a painter. He comes from Oslo.", ""]
    assert net_facts([prompt] * 3, answers) == pytest.approx([3 / 4, 2 / 4 - 1 / 4, 0.0])


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw = np.random.default_rng(0)
    for number in range(48):
        hot = float(draw.normal())
        turn = 12.0 * math.exp(-0.9 * hot) * math.exp(0.05 * draw.normal())
        run = tmp_path / f"llama-reward{number % 8}-usual-{number}"
        run.mkdir()
        pilot = rows(**{"objective/kl": [math.exp(0.8 + 0.5 * hot)] * 10})
        steps = range(0, 61, 3)
        curve = {step: 0.7 + 0.004 * min(step, turn) - 0.01 * max(0.0, step - turn) for step in steps}
        lines = [{"step": 0, "eval/metric_greedy": curve[0]}]
        lines += [
            {"step": step, **pilot[min(step, 10) - 1], **({"eval/metric_greedy": curve[step]} if step in curve else {})}
            for step in range(1, 61)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "done").write_text("")
    table.main(table.Options(tmp_path, tmp_path / "model.json", tmp_path / "t.md"))
    told = capsys.readouterr().out
    found = re.search(r"within 30% of the true step for (\d+) of (\d+)", told)
    assert found is not None
    assert int(found[1]) >= 0.8 * int(found[2]) > 10
    assert "False alarms: " in (tmp_path / "t.md").read_text()
    assert json.loads((tmp_path / "model.json").read_text())["features"][0] == "kl"
    with pytest.raises(DataError, match="no finished run"):
        table.read_runs(table.Options(tmp_path / "t.md"))
