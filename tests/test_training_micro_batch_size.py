"""``ppo.micro_batch_size auto``: as many sequences at once as fit, fewer where they don't, and the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from cagsr.config import DataConfig, EvalConfig, ModelConfig, PPOConfig, RunConfig, SamplingConfig, TrainConfig
from cagsr.errors import ConfigError
from cagsr.models.actor_critic import ActorCritic
from cagsr.support import memory_at_hand as at_hand
from cagsr.train import train
from cagsr.training import micro_batch_size
from cagsr.training.micro_batch_size import MicroBatchSize

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


def test_work_that_runs_out_of_memory_is_done_again_with_half_as_many(capsys: pytest.CaptureFixture[str]):
    size = MicroBatchSize("auto")
    size.size = 12
    tried: list[int] = []

    def work() -> str:
        tried.append(size.size)
        if size.size > 3:
            raise torch.OutOfMemoryError(CUDA) if len(tried) == 1 else RuntimeError(CPU)
        return "done"

    assert size.fitting(work) == "done"
    assert tried == [12, 6, 3]
    said = capsys.readouterr().err
    assert said.count("Memory ran out") == 2
    assert "with 12 sequences at once: 6 from now on." in said
    assert "with 6 sequences at once: 3 from now on." in said


@pytest.mark.parametrize(("setting", "size", "error"), [(8, 8, CPU), ("auto", 1, CPU), ("auto", 8, "another error")])
def test_what_halving_does_not_mend_is_raised(setting: Any, size: int, error: str):
    sizes = MicroBatchSize(setting)
    sizes.size = size
    tried: list[int] = []

    def work() -> None:
        tried.append(sizes.size)
        raise RuntimeError(error)

    with pytest.raises(RuntimeError, match=error[-20:]):
        sizes.fitting(work)
    assert tried == [size]


def settings(folder: Path, output: str, size: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(str(folder), device="cpu"),
        data=DataConfig(str(tiny.save_prompts(folder / "prompts.jsonl"))),
        output_dir=str(folder / output),
        sampling=SamplingConfig(num_generations=4, max_new_tokens=6),
        ppo=PPOConfig(num_ppo_epochs=2, micro_batch_size=size, learning_rate=1e-3),
        evaluation=EvalConfig(held_out=0),
        run=RunConfig(steps=2, batch_size=2),
    )


def metrics(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_chooses_and_halves_has_the_result_of_a_fixed_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny.save_model(tmp_path)
    fixed, auto = settings(tmp_path, "fixed", 8), settings(tmp_path, "auto", "auto")
    train(fixed)
    seen: list[int] = []
    forward, backward = ActorCritic.forward, torch.Tensor.backward

    def noted(self: ActorCritic, inputs: Any, *rest: Any) -> Any:
        rows = len(inputs.response_ids)
        seen.append(rows)
        if rows > 4 and not torch.is_grad_enabled():
            raise RuntimeError(CPU)
        return forward(self, inputs, *rest)

    def backs(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)  # gradients are there already when memory runs out
        if seen[-1] > 2:
            raise RuntimeError(CPU)

    monkeypatch.setattr(ActorCritic, "forward", noted)
    monkeypatch.setattr(torch.Tensor, "backward", backs)
    capsys.readouterr()
    train(auto)
    assert seen[:5] == [1, 8, 4, 4, 4]  # measured, all, halved, halved, in the update
    assert seen[5:9] == [2, 2, 2, 2]
    said = capsys.readouterr().err
    assert said.count("Micro-batches (auto): 8 sequences of up to ") == 1
    assert said.count("Memory ran out") == 2
    for one, other in zip(metrics(fixed), metrics(auto), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if "ratio_first_error" not in name and "logp_difference" not in name:
                assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("free", [40e6, 80e6])
def test_twice_the_memory_holds_twice_the_sequences(free: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And what is to come, the optimizer's moments and blocks of logits, is not given away."""
    from cagsr.models.load import load_model
    from test_scoring_scorer import rolled_out

    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    rollout = rolled_out(loaded, copies=2)
    monkeypatch.setattr(micro_batch_size, "_kept_bytes", lambda *args: 10_000_000)
    monkeypatch.setattr(micro_batch_size, "_still_to_come", lambda *args: 0)
    monkeypatch.setattr(micro_batch_size, "memory_at_hand", lambda device: free)
    size = MicroBatchSize("auto")
    size.choose(ActorCritic(loaded), loaded, rollout, lambda tensor: tensor)
    assert size.size == int(0.6 * free / 10_000_000)
    fixed = MicroBatchSize(3)
    fixed.choose(ActorCritic(loaded), loaded, rollout, lambda tensor: tensor)
    assert fixed.size == 3


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "inactive_file 50\nx 1\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(at_hand, "_CGROUPS", tmp_path)
    assert at_hand.memory_at_hand(torch.device("cpu")) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert at_hand.memory_at_hand(torch.device("cpu")) > 1_000_000


def test_only_a_number_or_auto(tmp_path: Path):
    with pytest.raises(ConfigError, match="micro_batch_size"):
        train(settings(tmp_path, "run", "many"))
    with pytest.raises(ConfigError, match="micro_batch_size"):
        train(settings(tmp_path, "run", 0))
