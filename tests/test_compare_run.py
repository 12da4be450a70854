"""``cagsr compare`` as a user runs it, on tiny models: whole, killed and gone on with, and reported."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import apart
import tiny

COLOURS = ("red", "blue", "green", "big", "small")
ANIMALS = ("cat", "dog", "bird", "house", "tree")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan with one seed, an RL method, a method after it, and best of N."""
    tiny.save_model(tmp_path / "ready")
    rows = [{"prompt": f"tell me about the {colour} {animal}"} for colour in COLOURS for animal in ANIMALS]
    test = [
        {"prompt": f"about the {colour} {animal} .", "references": [f"the {colour} {animal}"]}
        for colour in COLOURS
        for animal in ANIMALS[:2]
    ]
    for name, content in (("train", rows[:20]), ("held_out", rows[20:]), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "checks.py").write_text(
        "def words(prompts, completions, **columns):\n    return [float(len(text.split())) for text in completions]\n"
        "def report(prompts, completions, **columns):\n    return [{'words_said': float(len(c.split()))} for c in completions]\n"
    )
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump(
            {
                "run": {"steps": 15, "batch_size": 3, "save_every": 1},
                "sampling": {"num_generations": 2, "max_new_tokens": 5},
                "evaluation": {"every": 5},
                "model": {"device": "cpu"},
                "ppo": {"estimator": "rloo"},
                "reward": {"associations": {"answers": 40, "min_count": 2, "floor": 0.05}},
            }
        )
    )
    content: dict[str, Any] = {
        "title": "A tiny comparison",
        "work": str(tmp_path / "work"),
        "prepare": ["{python} -c \"import pathlib; pathlib.Path('{work}/prepared').open('a').write('once ')\""],
        "start": f"{{python}} -c \"import shutil; shutil.copytree('{tmp_path}/ready', '{{output}}')\"",
        "files": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out", "test")},
        "judges": {"checker": "checks.report"},
        "configs": [str(tmp_path / "train.yaml")],
        "seeds": [0],
        "base": "ours",
        "primary": ["words_said", "rouge_l"],
        "methods": {
            "ours": {"label": "Ours"},
            "best": {"kind": "best_of_n", "num_generations": 2},
            "shorter": {"group": "ablation", "set": {"run.steps": 1}, "after": "ours"},
        },
        "contrasts": [["ours", "best"], ["ours", "start"]],
        "validity": {"prompts": 4, "checkers": {"words": "checks.words"}, "disagreements": 2},
        "limits": ["Tiny models with random weights."],
    }
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def start(plan: Path, *more: str) -> apart.Process:
    """As a user starts it; its jobs are processes that it starts itself."""
    path = os.pathsep.join([str(plan.parent), os.environ.get("PYTHONPATH", "")])
    return apart.python("-m", "cagsr.commands.main", "compare", plan, *more, environment={"PYTHONPATH": path})


@pytest.mark.timeout(900)  # some twenty processes one after the other, half of which import torch
def test_killed_gone_on_with_and_reported(plan: Path, tmp_path: Path):
    work = tmp_path / "work"
    with start(plan, "--jobs", "1") as process:
        deadline = time.monotonic() + apart.SECONDS
        # A job looks every second whether its comparison is still there: 15 steps take longer.
        while not list((work / "methods" / "ours-seed0" / "checkpoints").glob("step-*")):
            assert process.status is None, process.said
            assert time.monotonic() < deadline, process.stacks()
            time.sleep(0.05)
        process.kill()  # the comparison alone: its job must notice
        while apart.marked(process.mark):
            assert time.monotonic() < deadline, process.stacks()
            time.sleep(0.05)
    done = {file.name for file in work.rglob("done/*.json")}
    assert {"prepare.json", "start-seed0.json", "method-start-seed0.json"} <= done
    assert "method-ours-seed0.json" not in done

    # a job that fails is named, the others' results stay, and the exit status says so
    content = yaml.safe_load(plan.read_text())
    content["methods"]["broken"] = {"set": {"ppo.learning_rate": -1.0}}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    with start(plan, "--jobs", "2") as process:
        assert process.wait(600) == 2, process.said
        said = process.said
    assert "3 of 8 jobs are done already" in said
    assert "method-broken-seed0" in said
    assert "'ppo.learning_rate' -1.0: must be above 0" in said
    assert "Traceback" not in said
    # the commands that were done were not done again, and the killed run went on from its checkpoint
    assert (work / "prepared").read_text() == "once "
    log = (work / "logs" / "method-ours-seed0.log").read_text()
    assert "Going on from" in log
    metrics = [
        json.loads(line) for line in (work / "methods" / "ours-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in metrics] == list(range(16))

    report = (work / "report.md").read_text()
    for expected in (
        "# A tiny comparison",
        "## The methods",
        "Ours",
        "words_said",
        "## Where the reward is wrong",
        "Tiny models with",
    ):
        assert expected in report
    page = (work / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    # the numbers in the table are those of the answers that were judged
    result = json.loads((work / "results" / "ours-seed0.json").read_text())
    values = result["values"]["sampled"]["words_said"]
    assert values == [float(len(text.split())) for text in result["texts"]["sampled"]]
    assert f"{sum(values) / len(values):.3f}" in report

    assert "Not there, because they failed: method-broken-seed0" in report

    content["methods"].pop("broken")
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    once = apart.finish(start(plan, "--report_only"))
    assert "jobs are done already" not in once
    report_alone = (work / "report.md").read_text()
    assert "broken" not in report_alone
    assert {line for line in report.splitlines() if line.startswith("| Ours |")} <= set(report_alone.splitlines())
