"""The examples of other loops run offline, and the code in their document is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from examples.integrations import openrlhf_reward, trl_grpo, verl_reward

import tiny
from cagsr.integrations.frozen import VARIABLE
from cagsr.integrations.trl import AttentionReward

DOCUMENT = Path(__file__).parent.parent / "docs" / "integrations.md"


@pytest.mark.parametrize(("algorithm", "source"), [("grpo", "policy"), ("rloo", "reference")])
def test_trl_example(tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithm: str, source: str) -> None:
    trainer = trl_grpo.main(
        ["--output_dir", str(tmp_path), "--steps", "2", "--algorithm", algorithm, "--source", source]
    )
    assert trainer.state.global_step == 2
    assert "step 2: reward's deviation" in capsys.readouterr().out


def test_examples_of_loops_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # the examples set it; restored afterwards
    scores = verl_reward.main(["--output_dir", str(tmp_path / "verl")])
    found = openrlhf_reward.main(["--output_dir", str(tmp_path / "openrlhf")])
    # The same model, prompt and answer (the first one ends in both): the same reward.
    assert found["rewards"][0].item() == pytest.approx(scores[0]["score"], abs=1e-5)
    assert scores[1]["repetition"] > scores[0]["repetition"] == 0.0


def test_the_code_in_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_model(Path("start"))
    (code,) = re.findall(r"^```py\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    arguments = {
        "output_dir": "run",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    made: dict[str, object] = {
        "arguments": arguments,
        "dataset": Dataset.from_dict({"prompt": ["tell me about the red cat", "a small bird near the tree"]}),
    }
    exec(code, made)
    assert isinstance(made["reward"], AttentionReward)
    assert made["trainer"].state.global_step == 1  # type: ignore[attr-defined]
