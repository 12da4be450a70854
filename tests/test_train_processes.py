"""Two gloo processes on the CPU: a run ends as one run, and the update gives what one process gives.

This file is also what the processes of the second test run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import tiny
from cagsr.config import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.build import build_reward
from cagsr.update.ppo import PPO

PROMPTS, GENERATIONS = 4, 4


def launch(processes: int, *command: str) -> None:
    """Run ``python -m torch.distributed.run`` on the CPU with this interpreter, and fail with what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def test_two_processes_make_one_run(folder: Path) -> None:
    flags = {
        "--model": folder / "start",
        "--model.device": "cpu",
        "--data": folder / "prompts.jsonl",
        "--output_dir": folder / "run",
        "--steps": 2,
        "--run.batch_size": 2,
        "--num_generations": 4,
        "--max_new_tokens": 6,
        "--evaluation.held_out": 2,
        "--run.save_every": 0,
        "--run.sample_rows": 100,
    }
    launch(2, "-m", "cagsr.commands.main", "train", *(str(part) for pair in flags.items() for part in pair))
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]  # one writer
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["val/ratio_first_error"] < 1e-4 for row in rows[1:])
    assert rows[1]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[2]["objective/kl_k3"] > 0
    # Reduced over processes, not one process's: normalised within prompts, the mean is 0 over all answers.
    assert rows[1]["objective/scores"] == pytest.approx(0.0, abs=1e-5)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert {"rng-rank0.json", "rng-rank1.json"} <= {file.name for file in checkpoint.iterdir()}
    start, final = (load_file(path / "model.safetensors") for path in (folder / "start", run / "final"))
    assert any(not torch.equal(final[name], value) for name, value in start.items())


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_micro_batches_change_nothing_given_the_same_experience(folder: Path, estimator: str) -> None:
    whole = updated(folder, estimator, micro=16)
    for micro in (8, 4, 2):
        assert_same(updated(folder, estimator, micro=micro), whole)


def test_two_processes_update_as_one(folder: Path) -> None:
    """The same experience as a whole in one process, and as a half in each of two."""
    launch(2, str(Path(__file__).resolve()), str(folder))
    for estimator in ("gae", "grpo"):
        found = load_file(folder / f"{estimator}-0.safetensors")
        other = load_file(folder / f"{estimator}-1.safetensors")
        weights = [name for name in found if name.startswith("weight/")]
        assert all(torch.equal(found[name], other[name]) for name in weights)  # the processes stay together
        assert_same(found, updated(folder, estimator, micro=8))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = {"atol": 2e-5, "rtol": 1e-4} if name.startswith("weight/") else {"atol": 2e-4, "rtol": 1e-3}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def updated(folder: Path, estimator: str, micro: int, process: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Weights and metrics after one update on this process's part of an experience that all processes sample alike."""
    config = TrainConfig(
        model=ModelConfig(str(folder / "start"), device="cpu"),
        data=DataConfig(str(folder / "prompts.jsonl")),
        output_dir=str(folder / "run"),
        sampling=SamplingConfig(num_generations=GENERATIONS, max_new_tokens=6),
        ppo=PPOConfig(
            estimator=estimator,  # type: ignore[arg-type]
            num_ppo_epochs=2,
            kl_coef=0.3,
            entropy_coef=0.01,
            micro_batch_size=PROMPTS * GENERATIONS,
            learning_rate=1e-3,
            adam_eps=1e-3,  # Adam divides rounding by rounding where a gradient is all but 0
        ),
        run=RunConfig(steps=5),
    )
    torch.manual_seed(0)
    loaded = load_model(config.model)
    with torch.no_grad():  # many answers stop early, so that the processes have unequal numbers of tokens
        loaded.model.lm_head.weight[loaded.tokenizer.eos_token_id] *= -5
    prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=50)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    ppo = PPO(config, loaded, build_reward(config.reward, device="cpu"), accelerator)
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as alone:
        # Every process samples everything: counted once, not once for each process (whitening divides by n - 1).
        alone.setattr(ppo, "reduce", lambda tensor: tensor)
        experience = ppo.collect(prompts.prompts[:PROMPTS])
    tokens = experience.rollout.response_mask.view(4, -1, experience.rollout.response_mask.shape[1]).sum(dim=(1, 2))
    assert len(set(tokens.tolist())) > 1
    assert tokens[:2].sum() != tokens[2:].sum()
    # Only the update is cut into micro-batches: the experience is the same to the last bit.
    ppo.config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, micro_batch_size=micro))
    count = PROMPTS * GENERATIONS // processes
    metrics = ppo.update(rows_of(experience, slice(process * count, (process + 1) * count)))
    weights = {f"weight/{name}": value.detach().clone() for name, value in loaded.model.named_parameters()}
    whole = {name: torch.tensor(float(value)) for name, value in metrics.items()}
    return weights | whole | {"advantages": experience.advantages.advantages}


def rows_of(value: Any, part: slice) -> Any:
    """Some of the answers of a dataclass of batched tensors and tuples."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: rows_of(getattr(value, field.name), part) for field in dataclasses.fields(value)}
        return type(value)(**fields)  # type: ignore[operator]
    if isinstance(value, dict):
        return {name: rows_of(one, part) for name, one in value.items()}
    return value[part] if isinstance(value, torch.Tensor | tuple) else value


if __name__ == "__main__":
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for each in ("gae", "grpo"):
        tensors = updated(Path(sys.argv[1]), each, 8 // world, rank, world)
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            Path(sys.argv[1]) / f"{each}-{rank}.safetensors",
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
