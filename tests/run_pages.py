"""Run folders written by hand, for the tests of the run's page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cagsr.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from cagsr.parse import to_yaml

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- {{ 7*7 }} \u2028 &amp;"


def metrics(step: int) -> dict[str, Any]:
    """A step's numbers, none of them round."""
    row = {
        "step": step,
        "objective/raw_scores": 0.1 + step / 7,
        "objective/scores": step / 1e9,
        "objective/kl": step * 0.37,
        "policy/entropy_avg": 2.0 - step / 31,
        "response/length": 20 + (step * 7) % 5 + 1 / 3,
        "response/repetition": 0.01 * step,
        "policy/clipfrac_avg": 0.02,
        "val/explained_variance": -0.5 + step / 40,
        "rewards/coverage/mean": 0.4 + step / 100,
        "rewards/coverage/share": 0.7,
        "rewards/total/mean": 0.0,
    }
    return row | ({"eval/metric": 0.5 + step / 100, "eval/metric_greedy": 0.6} if step % 5 == 0 else {})


def sample(step: int, prompt: str, completion: str, reward: float) -> dict[str, Any]:
    terms = {"coverage": 0.4 + reward, "repetition": None}
    return {"step": step, "prompt": prompt, "completion": completion, "reward": reward, "terms": terms,
            "contributions": {"coverage": reward, "repetition": 0.0}, "tokens": 5, "ended": True}  # fmt: skip


def make_run(
    folder: Path,
    *,
    steps: int = 20,
    done: int | None = None,
    final: bool = True,
    warnings: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] | None = None,
    held_out: Sequence[Mapping[str, Any]] = (),
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write a run folder as ``cagsr train`` leaves it: ``done`` of ``steps`` steps, with or without its final model."""
    folder.mkdir(parents=True, exist_ok=True)
    done = steps if done is None else done
    config = TrainConfig(ModelConfig("start"), DataConfig("prompts.jsonl"), str(folder), run=RunConfig(steps=steps))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.lock").write_text("1\n")
    start = [{"step": 0, "eval/metric": 0.5, "eval/metric_greedy": 0.6}]
    timings = [
        {
            "step": step,
            "collect_seconds": 2.0,
            "update_seconds": 1.0,
            "evaluation_seconds": 0.5,
            "response_tokens": 700.0,
        }
        for step in range(1, done + 1)
    ]
    if samples is None:
        samples = [
            sample(step, prompt, f"the {'red ' * (step > 1)}cat sees a house {step}", 0.25 * step - 1)
            for step in range(1, done + 1)
            for prompt in ("tell me about the cat", f"one of its own {step}")
        ]
    write(folder / "metrics.jsonl", start + [metrics(step) for step in range(1, done + 1)] if rows is None else rows)
    write(folder / "timings.jsonl", timings)
    write(folder / "samples.jsonl", samples)
    write(folder / "warnings.jsonl", warnings)
    write(folder / "held_out.jsonl", held_out)
    if final:
        (folder / "final").mkdir(exist_ok=True)
        (folder / "final" / "config.json").write_text("{}")
    return folder


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WARNING = {
    "step": 9,
    "name": "length_drift",
    "sentence": "Answers have become longer: <b>40</b> tokens.",
    "action": "warn",
}
