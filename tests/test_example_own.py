"""Parts of one's own, outside the package: each short, and all three in one run; and the loop for readers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from cagsr.commands.main import main

ROOT = Path(__file__).parents[1]
OWN = sorted((ROOT / "examples" / "own").glob("[a-z]*.py"))


def test_each_is_short() -> None:
    assert {path.stem for path in OWN} == {"politeness", "ask_again", "confidence_cap"}
    for path in OWN:
        assert len(path.read_text().splitlines()) < 40, path.name
    assert len((ROOT / "examples" / "minimal_loop.py").read_text().splitlines()) <= 200


def test_a_term_a_task_and_an_objective_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Small random models hardly ever end an answer, and one that was cut ends its episode: here a word ends it.
    flags = {
        "--model": tiny.save_model(tmp_path / "start"),
        "--model.device": "cpu",
        "--data": tiny.save_prompts(tmp_path / "prompts.jsonl"),
        "--output_dir": tmp_path / "run",
        "--steps": 2,
        "--run.batch_size": 4,
        "--num_generations": 4,
        "--max_new_tokens": 12,
        "--sampling.stop_strings": "the",
        "--evaluation.held_out": 2,
        "--ppo.estimator": "rloo",
        "--rollout.task": "examples.own.ask_again.AskAgain",
        "--reward.functions": "examples.own.politeness.Politeness",
        "--reward.function_settings": "Politeness.word=dog",
        "--ppo.objectives": "examples.own.confidence_cap.ConfidenceCap",
        "--run.sample_rows": 16,
    }
    assert main(["train", *(str(part) for pair in flags.items() for part in pair)]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/politeness/mean", "loss/confidence_avg"} <= metrics[-1].keys()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    long = [row for row in samples if len(row.get("segments", ())) == 3]
    assert long
    for row in long:
        roles = [segment["role"] for segment in row["segments"]]
        assert roles == ["assistant", "user", "assistant"]
        assert re.fullmatch(r" and .+ \?", row["segments"][1]["content"])
        assert row["completion"] == row["segments"][2]["content"]
        assert sum(row["by_turn"]) == pytest.approx(row["reward"], abs=1e-5)
        said = [float("dog" in row["segments"][turn]["content"].split()) for turn in (0, 2)]
        assert row["terms"]["politeness"] == pytest.approx(sum(said) / 2)
    # What is saved is what was trained, and decoding and scoring saw the same policy, turn by turn.
    assert metrics[-1]["sampling/sampling_logp_difference/max"] < 1e-3
    assert metrics[-1]["val/ratio_first_error"] < 1e-4


def test_the_loop_for_readers_learns() -> None:
    command = [sys.executable, "-m", "examples.minimal_loop", "--steps", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, last = map(float, re.findall(r"(0\.\d+) at (?:first|last)", done.stdout))
    assert last > first + 0.05
