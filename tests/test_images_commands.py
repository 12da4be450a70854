"""Prompts with images through the commands: trained on, sampled, scored, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import seeing
from cagsr.commands.main import main


@pytest.mark.parametrize("kind", seeing.KINDS)
def test_the_whole_loop_trains(kind: str, tmp_path: Path) -> None:
    seeing.save_model(tmp_path / "model", kind)
    rows = seeing.save_rows(tmp_path, 4, 2)
    run = tmp_path / "run"
    how = {
        "model.path": tmp_path / "model", "model.device": "cpu", "data.path": rows, "output_dir": run, "run.steps": 1,
        "run.batch_size": 2, "sampling.num_generations": 2, "sampling.max_new_tokens": 4, "evaluation.held_out": 0,
        "reward.image_coverage.weight": 1, "reward.image_balance.weight": 1, "salience.weighting": "uniform",
        "ppo.num_ppo_epochs": 1, "ppo.estimator": "rloo", "run.sample_rows": 1,
    }  # fmt: skip
    assert main(["train", *(str(part) for name, value in how.items() for part in (f"--{name}", value))]) == 0
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < metrics["rewards/image_balance/mean"] <= metrics["rewards/image_coverage/mean"] <= 1
    assert metrics["scoring/shared_prompt_logp_difference"] < 1e-3
    assert metrics["val/ratio_first_error"] < 1e-3
    trained = AutoModelForImageTextToText.from_pretrained(run / "final")
    started = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert any((one != other).any() for one, other in zip(trained.parameters(), started.parameters(), strict=True))
    files = {file.name for file in (run / "final").iterdir()}
    assert {"processor_config.json", "tokenizer.json"} <= files


def test_answers_are_sampled_scored_ranked_judged_and_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one command writes the next one reads, in another folder: the images go along."""
    model = seeing.save_model(tmp_path / "model", "llava")
    data = seeing.save_rows(tmp_path, 2, 2)
    out = tmp_path / "elsewhere"
    out.mkdir()
    where = ["--model.path", str(model), "--model.device", "cpu"]
    few = ["--sampling.max_new_tokens", "4", "--sampling.num_generations", "2"]
    pays = ["--reward.image_coverage.weight", "1", "--salience.weighting", "uniform"]
    assert main(["generate", *where, *few, "--data.path", str(data), "--output", str(out / "made.jsonl")]) == 0
    made = [json.loads(line) for line in (out / "made.jsonl").read_text().splitlines()]
    assert len(made) == 4
    assert made[0]["prompt"] == "tell me about the cat"
    assert made[0]["images"] == [str(tmp_path / "0-0.png"), str(tmp_path / "0-1.png")]
    said = [{**row, "completion": row["completion"] or "the cat"} for row in made]
    (out / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))

    assert (
        main(["score", *where, *pays, "--data.path", str(out / "made.jsonl"), "--output", str(out / "scored.jsonl")])
        == 0
    )
    scored = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
    assert all(0 < row["terms"]["image_coverage"] <= 1 and row["images"] for row in scored)
    assert main(["rank", *where, *few, *pays, "--data.path", str(data), "--output", str(out / "ranked.jsonl")]) == 0
    ranked = [json.loads(line) for line in (out / "ranked.jsonl").read_text().splitlines()]
    assert [len(row["candidates"]) for row in ranked] == [2, 2]
    assert "image_coverage" in ranked[0]["candidates"][0]["terms"]
    assert main(["eval", "--answers", str(out / "made.jsonl"), "--data.path", str(data)]) == 0
    page = out / "page.html"
    assert main(["view", *where, *pays, "--data.path", str(out / "made.jsonl"), "--row", "3", "--out", str(page)]) == 0
    assert page.read_text().count("<figure data-image=") == 2
    typed = ["--prompt", "the cat", "--image", str(tmp_path / "0-0.png"), "--salience.weighting", "uniform"]
    assert main(["view", *where, *typed, "--answer", "a dog", "--out", str(page)]) == 0
    assert page.read_text().count("<figure data-image=") == 1
    assert main(["generate", *where, "--data.path", str(data), "--image", "a.png"]) == 2
    assert "--image belongs to --prompt" in capsys.readouterr().err
    rated = [{**row, "chosen": row["completion"], "rejected": "a"} for row in said]
    (out / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    assert main(["dpo", *where, "--data.path", str(out / "rated.jsonl"), "--output_dir", str(out / "dpo")]) == 2
    assert "the prompt has images, which nothing reads here" in capsys.readouterr().err
    assert not (out / "dpo").exists()


def test_what_reads_texts_alone_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = seeing.save_model(tmp_path / "model", "llava"), seeing.save_rows(tmp_path, 2)
    common = ["train", "--model.path", str(model), "--data.path", str(data), "--output_dir", str(tmp_path / "run")]
    for flag, value in (
        ("--rollout.engine", "vllm"),
        ("--rollout.task", "cagsr.tasks.task.Once"),
        ("--reward.grounding_probe.weight", "1"),
    ):
        assert main([*common, flag, value]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"cagsr train: error: {flag}")
        assert "works with texts alone" in told
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"the {word}"}) + "\n" for word in ("cat", "dog", "bird")))
    asked = ["train", "--model.path", str(model), "--data.path", str(rows), "--output_dir", str(tmp_path / "run")]
    assert main([*asked, "--reward.image_coverage.weight", "1"]) == 2
    assert "has an image (column 'images')" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
