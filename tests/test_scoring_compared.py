"""While training, the scoring pass is compared with the plain one, and decoding with the scoring pass."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import tiny
from cagsr.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    PPOConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.errors import RolloutError
from cagsr.models import decoder_only, sharing
from cagsr.models.inputs import PassInputs
from cagsr.scoring.engine_mismatch import decoding_metrics
from cagsr.train import train
from test_scoring_engine_mismatch import OURS, made

NAME = "scoring/shared_prompt_logp_difference"


def config(folder: Path, output: str, **run: Any) -> TrainConfig:
    if not (folder / "config.json").exists():
        tiny.save_model(folder)
    return TrainConfig(
        model=ModelConfig(str(folder), device="cpu"),
        data=DataConfig(str(tiny.save_prompts(folder / "prompts.jsonl"))),
        output_dir=str(folder / output),
        sampling=SamplingConfig(num_generations=4, max_new_tokens=6),
        ppo=PPOConfig(num_ppo_epochs=1, num_mini_batches=1, learning_rate=1e-3),
        evaluation=EvalConfig(held_out=0),
        run=dataclasses.replace(RunConfig(steps=3, batch_size=2), **run),
    )


def rows(folder: str, name: str) -> list[dict[str, Any]]:
    path = Path(folder) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(folder: str) -> list[dict[str, float]]:
    return [row for row in rows(folder, "metrics.jsonl") if "objective/kl" in row]


def test_what_is_shared_is_compared_at_every_step(tmp_path: Path):
    settings = config(tmp_path, "run")
    train(settings)
    for row in metrics(settings.output_dir):
        assert row[NAME] < 1e-4
        assert row["sampling/sampling_logp_difference/mean"] <= row["sampling/sampling_logp_difference/max"] < 1e-4
    assert not [row for row in rows(settings.output_dir, "warnings.jsonl") if row.get("name") == "shared_prompts"]


def test_a_prompt_that_is_shared_wrongly_is_noticed_said_and_read_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The probe is made to say yes, as it would of a model whose fault shows at other lengths or weights."""
    plain = config(tmp_path, "plain", steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "_agrees", lambda *args: False)
        train(plain)
    genuine = decoder_only.DecoderOnly.hidden

    def wrong(self: Any, seen: Any, fed: PassInputs) -> Tensor:
        return genuine(self, seen, fed) * (1.0 if fed.shared is None else 1.05)

    monkeypatch.setattr(decoder_only.DecoderOnly, "hidden", wrong)
    monkeypatch.setattr(sharing, "_agrees", lambda *args: True)
    broken = config(tmp_path, "broken", save_every=2)
    train(broken)
    said = [row for row in rows(broken.output_dir, "warnings.jsonl") if row["name"] == "shared_prompts"]
    assert [row["step"] for row in said] == [1]
    assert "from this step on each prompt is read with each answer" in capsys.readouterr().err.replace("\n", " ")
    first, *later = metrics(broken.output_dir)
    assert first[NAME] > 0.01
    assert all(NAME not in row for row in later)
    same = [metrics(one.output_dir) for one in (plain, broken)]
    for expected, found in zip(*same, strict=False):
        found.pop(NAME, None)
        assert found == expected
    # A resumed run does not try again.
    resumed = dataclasses.replace(broken, run=dataclasses.replace(broken.run, resume=True, steps=4))
    train(resumed)
    assert metrics(resumed.output_dir)[-1] == metrics(plain.output_dir)[-1]


def test_answers_drawn_from_another_policy_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model whose cache gives other logits for one token at a time."""
    settings = config(tmp_path, "run")
    genuine = LlamaForCausalLM.forward

    def forgetful(self: LlamaForCausalLM, *args: Any, **options: Any) -> Any:
        output = genuine(self, *args, **options)
        if options["input_ids"].shape[1] == 1:
            output.logits = output.logits.roll(1, dims=-1)
        return output

    forgetful.__signature__ = inspect.signature(genuine)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    with pytest.raises(RolloutError, match=r"step 1: .* nats a token away from those of the scoring pass"):
        train(settings)


def test_decoding_by_hand():
    readings, rollout = made(torch.where(OURS < 0, -0.3, 0.0), engine=None)
    rollout = dataclasses.replace(rollout, decoded_logprobs=OURS + torch.tensor([[0.4, 0.3], [0.9, 5.0]]))
    found = decoding_metrics(readings, rollout, 0.5, lambda tensor: tensor)
    # OURS + 0.3 is the filtered policy; the last token is padding.
    assert found["sampling/sampling_logp_difference/mean"] == 0.23333  # (0.1 + 0.0 + 0.6) / 3
    assert found["sampling/sampling_logp_difference/max"] == 0.6
    with pytest.raises(RolloutError, match=r"0\.23 nats a token away .*limit 0\.2"):
        decoding_metrics(readings, rollout, 0.2, lambda tensor: tensor)
    assert decoding_metrics(readings, rollout, 0.0, lambda tensor: tensor) == found
    assert decoding_metrics(readings, dataclasses.replace(rollout, decoded_logprobs=None), 0.2, lambda t: t) == {}
