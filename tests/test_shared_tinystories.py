"""The real pretrained model and the real stories, as they are, through the commands (skipped where they are not here)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cagsr.commands.main import main

SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "TinyStories-656K"
STORIES = SHARED / "data" / "tinystories" / "stories.jsonl"
# The first part of each story is the prompt, the rest its reference.
DATA = ["--model", str(MODEL), "--data", str(STORIES), "--data.prompt_column", "text", "--data.split_text", "0.2"]

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="../shared with the real TinyStories model is not here")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train(tmp_path: Path):
    run = tmp_path / "run"
    sizes = ["--data.limit", "24", "--run.batch_size", "2", "--sampling.num_generations", "4"]
    sizes += ["--sampling.max_new_tokens", "12", "--evaluation.held_out", "4", "--steps", "2"]
    assert main(["train", *DATA, "--output_dir", str(run), *sizes]) == 0
    last = rows(run / "metrics.jsonl")[-1]
    assert last["step"] == 2
    assert 0 < last["rewards/grounded_coverage/mean"] < 1
    assert last["val/ratio_first_error"] < 1e-3
    assert (run / "final" / "model.safetensors").exists()


def test_score_rank_and_diagnose(tmp_path: Path):
    scores, best, diagnosis = tmp_path / "scores.jsonl", tmp_path / "best.jsonl", tmp_path / "diagnosis.json"
    assert main(["score", *DATA, "--data.limit", "6", "--output", str(scores)]) == 0
    scored = rows(scores)
    assert len(scored) == 6
    assert all(0 < row["terms"]["coverage"] <= 1 for row in scored)
    few = ["--data.limit", "3", "--num_generations", "4", "--max_new_tokens", "12"]
    assert main(["rank", *DATA, *few, "--output", str(best)]) == 0
    assert len(rows(best)) == 3
    assert main(["diagnose", *DATA, *few, "--num_prompts", "3", "--output", str(diagnosis)]) == 0
    assert json.loads(diagnosis.read_text())
    assert diagnosis.with_suffix(".yaml").exists()
