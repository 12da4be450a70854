"""Several gloo processes on the CPU, DDP and FSDP2: a run ends as one run, and the update gives what one process gives.

The processes are forked (tests/apart.py), and once started by torchrun, as users start them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file

import apart
import tiny
from cagsr.config import (
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.errors import ConfigError
from cagsr.flow import Episode
from cagsr.models.load import load_model
from cagsr.models.sharding import divided_like, full_state, is_sharded
from cagsr.prompts.batch import collate_prompts
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.stream import PromptStream
from cagsr.reward.build import build_reward
from cagsr.reward.registry import Resources
from cagsr.rollout.episodes import EpisodePlayer, played
from cagsr.runs.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from cagsr.support.processes import check_fsdp, check_processes, start_accelerator
from cagsr.tasks.segments import SegmentEncoder
from cagsr.train import train
from cagsr.training.ppo import PPO

PROMPTS, GENERATIONS = 4, 4
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    """Two processes (FSDP2), then one, then two (DDP): the prompts are those of one uninterrupted run."""
    config = TrainConfig(
        model=ModelConfig(str(folder / "start"), device="cpu"),
        data=DataConfig(str(folder / "prompts.jsonl")),
        output_dir=str(folder / "run"),
        sampling=SamplingConfig(num_generations=4, max_new_tokens=6),
        ppo=PPOConfig(lr_scheduler="linear", kl_controller="adaptive", kl_coef=0.2, horizon=100),
        evaluation=EvalConfig(held_out=2),
        run=RunConfig(steps=2, batch_size=4, save_every=0, save_total_limit=9, sample_rows=100),
    )
    flags = {
        "--model": folder / "start",
        "--model.device": "cpu",
        "--data": folder / "prompts.jsonl",
        "--output_dir": folder / "run",
        "--run.batch_size": 4,
        "--num_generations": 4,
        "--max_new_tokens": 6,
        "--ppo.lr_scheduler": "linear",
        "--ppo.kl_controller": "adaptive",
        "--ppo.kl_coef": 0.2,
        "--ppo.horizon": 100,
        "--evaluation.held_out": 2,
        "--run.save_every": 0,
        "--run.save_total_limit": 9,
        "--run.sample_rows": 100,
    }
    command = ["train", *(str(part) for pair in flags.items() for part in pair)]
    apart.together(2, apart.command, *command, "--steps", "2", **FSDP2)
    run = folder / "run"
    rows = logged(run)
    assert [row["step"] for row in rows] == [0, 1, 2]  # one writer
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["val/ratio_first_error"] < 1e-4 for row in rows[1:])
    assert rows[1]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[2]["objective/kl_k3"] > 0
    first = run / "checkpoints" / "step-000002"
    assert {"rng-rank0.json", "rng-rank1.json"} <= {file.name for file in first.iterdir()}
    files = (folder / "start/model.safetensors", run / "final/model.safetensors", first / "policy.safetensors")
    start, final, saved = map(load_file, files)
    assert any(not torch.equal(final[name], value) for name, value in start.items())
    assert all(torch.equal(final[name], value) for name, value in saved.items())
    assert_restored_whole(config, first, folder / "again")

    train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=3, resume=True)))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(apart.free_port()), "-m", "cagsr.commands.main"]
    said = apart.finish(apart.python(*launcher, *command, "--steps", "4", "--resume"))
    assert "written with 1 process(es) and there are 2" in said.replace("\n", " ")
    assert [row["step"] for row in logged(run)] == [0, 1, 2, 3, 4]

    loaded = load_model(config.model)
    everything = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=58)
    stream = PromptStream(everything.split(2, 0)[0], 4, 0)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for step in range(1, 5):
        order = list(dict.fromkeys(row["prompt"] for row in samples if row["step"] == step))
        expected = [prompt.prompt.text for prompt in stream.next()]
        assert order == (expected if step == 3 else expected[:2])  # only the main process's answers are kept
    moments = json.loads((first / "extra.json").read_text())["ppo"]["reward"]
    # Both processes' 16 answers of each of two steps, not one process's 8: the reward's scale is everybody's.
    assert {name: one["count"] for name, one in moments.items()} == dict.fromkeys(moments, 32.0)
    states = [
        json.loads((run / "checkpoints" / name / "extra.json").read_text()) for name in os.listdir(run / "checkpoints")
    ]
    positions = {state["ppo"]["scheduler_step"]: state["stream"] for state in states}
    # 12 prompts less 2 held out: step 3 ends two prompts into the second epoch.
    assert positions[3] == {"seed": 0, "epoch": 1, "position": 2}
    assert positions[4] == {"seed": 0, "epoch": 1, "position": 6}
    assert {row["kl_coef"] for row in logged(run)[1:]} != {0.2}


def assert_restored_whole(config: TrainConfig, checkpoint: Path, again: Path) -> None:
    """One process that loads a checkpoint of two and saves it writes the same files."""
    loaded = load_model(config.model)
    ppo = PPO(
        config,
        loaded,
        build_reward(config.reward, device="cpu", resources=Resources(loaded.texts)),
        start_accelerator(cpu=True),
    )
    state = CheckpointState(modules=ppo.modules(), optimizers={"adamw": ppo.optimizer})
    extra = load_checkpoint(checkpoint, state).extra
    ppo.load_state_dict(extra["ppo"])
    assert ppo.optimizer.state_dict()["state"]
    extra = dict(extra) | {"ppo": ppo.state_dict()}
    written = save_checkpoint(again, 2, dataclasses.replace(state, extra=extra), keep=1)
    for name in ("policy", "value_head", "optimizer-adamw"):  # a header's entries come in any order
        found, expected = (load_file(path / f"{name}.safetensors") for path in (written, checkpoint))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    for name in ("optimizer-adamw.json", "extra.json"):
        assert (written / name).read_bytes() == (checkpoint / name).read_bytes(), name


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_can_not_be_divided_is_refused() -> None:
    check_processes(6, 2, 1, 3)
    with pytest.raises(ConfigError, match=r"run.batch_size 8: .* 3 processes, so give a multiple of 3, as 6 or 9\."):
        check_processes(8, 2, 1, 3)
    with pytest.raises(ConfigError, match=r"as 4\."):
        check_processes(2, 2, 1, 4)
    with pytest.raises(ConfigError, match=r"num_mini_batches 5: more than the 4 answers of each of 3 processes"):
        check_processes(6, 2, 5, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
    ],
)
def test_what_is_not_supported_of_fsdp_is_refused(
    changes: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (FSDP2 | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        check_fsdp(FullyShardedDataParallelPlugin())


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_micro_batches_change_nothing_given_the_same_experience(folder: Path, estimator: str) -> None:
    whole = updated(folder, estimator, micro=16)
    for micro in (8, 4, 2):
        assert_same(updated(folder, estimator, micro=micro), whole)


CASES = ("gae", "grpo", "gae-fsdp2", "lora-fsdp2")
ESTIMATORS = ("gae", "rloo", "grpo", "rloo_turns")
"""With ``_turns``: of episodes of several turns."""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of all cases, one after the other."""
    return make_cases(tmp_path_factory.mktemp("two"), 2, (*(f"{one}-collect" for one in ESTIMATORS), *CASES))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cases(tmp_path_factory.mktemp("four"), 4, CASES[:2])


def make_cases(folder: Path, processes: int, cases: tuple[str, ...]) -> Path:
    """A folder with a model, prompts, and a file for each case and process."""
    tiny.save_model(folder / "start")
    tiny.save_prompts(folder / "prompts.jsonl")
    apart.together(processes, work_of_a_process, folder, cases)
    return folder


def work_of_a_process(folder: Path, cases: tuple[str, ...]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in cases:  # FSDP2 last: nothing takes it back
        if case.endswith("fsdp2"):
            os.environ.update(FSDP2)
        if case.endswith("collect"):
            tensors = collected(folder, case.partition("-")[0], rank, world)
        else:
            tensors = updated(folder, case, 8 // world, rank, world)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{case}-{rank}.safetensors")
    # gloo's threads may abort a process that is taken down while the other one still sends.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_update_as_one(request: pytest.FixtureRequest, processes: int) -> None:
    """The same experience as a whole in one process, and in parts in 2 and 4: 1 x 8 = 2 x 4 = 4 x 2 micro-batches."""
    folder = request.getfixturevalue("of_two" if processes == 2 else "of_four")
    for case in CASES if processes == 2 else CASES[:2]:
        found = load_file(folder / f"{case}-0.safetensors")
        for rank in range(1, processes):  # the processes stay together
            other = load_file(folder / f"{case}-{rank}.safetensors")
            assert all(torch.equal(value, other[name]) for name, value in found.items())
        assert_same(found, updated(folder, case, micro=8))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_processes_collect_as_one(of_two: Path, estimator: str) -> None:
    """The same answers to the same prompts, in one process and halved: rewards, advantages and metrics are the same."""
    parts = [load_file(of_two / f"{estimator}-collect-{rank}.safetensors") for rank in (0, 1)]
    whole = collected(of_two, estimator)
    for step in (0, 1):
        halves = whole[f"answer/{step}/reward"].view(2, -1)
        assert abs(float(halves[0].std() - halves[1].std())) > 0.01, (
            "halves that are alike would hide a missing reduction"
        )
    for name, value in whole.items():
        if name.startswith("answer/"):
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, atol=1e-5, rtol=1e-4, msg=name)
        else:
            for part in parts:
                torch.testing.assert_close(part[name], value, atol=1e-5, rtol=1e-4, msg=name)


def collected(folder: Path, estimator: str, process: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """This process's rewards and advantages, and the metrics and the reward's moments, of two steps."""
    estimator, _, turns = estimator.partition("_")
    config = TrainConfig(
        model=ModelConfig(str(folder / "start"), device="cpu"),
        data=DataConfig(str(folder / "prompts.jsonl")),
        output_dir=str(folder / "run"),
        sampling=SamplingConfig(
            num_generations=GENERATIONS, max_new_tokens=6, stop_strings=["the", "dog"] if turns else []
        ),
        ppo=PPOConfig(estimator=estimator, kl_coef=0.3, learning_rate=1e-9, turn_discount=0.5),  # type: ignore[arg-type]
        run=RunConfig(steps=5),
    )
    torch.manual_seed(0)
    loaded = load_model(config.model)
    found_prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=50)
    prompts = found_prompts.prompts
    encoder = SegmentEncoder(loaded, config.salience, found_prompts.frequency)
    player = EpisodePlayer(loaded, Again(), encoder, room=40) if turns else None
    accelerator = start_accelerator(cpu=True)
    reward = build_reward(
        config.reward,
        device="cpu",
        resources=Resources(loaded.texts),
        reduce=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
    )
    ppo = PPO(config, loaded, reward, accelerator)
    if (head := ppo.actor_critic.value_head) is not None:  # with values of 0 a part's returns would be its advantages
        torch.nn.init.constant_(head.weight, 0.1)
    sample, found = ppo.sampler.sample, {}
    for step in range(2):
        some = prompts[step * PROMPTS : (step + 1) * PROMPTS]
        own, count = slice(process * PROMPTS // processes, (process + 1) * PROMPTS // processes), GENERATIONS
        batch = collate_prompts(
            some, pad_token_id=loaded.pad_token_id, padding_side="left", num_generations=count, device=loaded.device
        )
        torch.manual_seed(step)
        repeated = [one for one in some for _ in range(count)]
        everything = played(player, partial(sample, sampling=config.sampling), repeated, batch)
        assert (everything.context is not None) == bool(turns)
        mine = rows_of(everything, slice(own.start * count, own.stop * count))
        ppo.sampler.sample = lambda batch, sampling, mine=mine: mine  # type: ignore[method-assign]
        experience = ppo.collect(some[own])
        metrics = ppo.update(experience)
        found |= {f"answer/{step}/reward": experience.returns.total}
        found |= {f"answer/{step}/advantages": experience.targets.advantages}
        wanted = ("objective/", "policy/approxkl_avg", "val/ratio", "rewards/")
        found |= {f"{step}/{name}": torch.tensor(value) for name, value in metrics.items() if name.startswith(wanted)}
    moments = {f"{name}/{key}": value for name, one in reward.state_dict().items() for key, value in one.items()}
    return found | {name: torch.tensor(float(value)) for name, value in moments.items()}


class Again:
    """Asks once more."""

    def reply(self, episode: Episode) -> str | None:
        return " near a house ." if len(episode.answers) == 1 else None


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = {"atol": 2e-5, "rtol": 1e-4} if name.startswith("weight/") else {"atol": 2e-4, "rtol": 1e-3}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def updated(folder: Path, case: str, micro: int, process: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Weights and metrics after one update on this process's part of an experience that all processes sample alike."""
    estimator = case.partition("-")[0].replace("lora", "gae")
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
        lora=LoraConfig(r=2 if case.startswith("lora") else 0),
    )
    torch.manual_seed(0)
    loaded = load_model(config.model, config.lora)
    with torch.no_grad():  # many answers stop early, so that the processes have unequal numbers of tokens
        loaded.model.get_output_embeddings().weight[loaded.tokenizer.eos_token_id] *= -5
    prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=50)
    accelerator = start_accelerator(cpu=True)
    assert accelerator.num_processes == processes
    ppo = PPO(config, loaded, build_reward(config.reward, device="cpu", resources=Resources(loaded.texts)), accelerator)
    assert is_sharded(ppo.module) == (processes > 1 and "fsdp2" in case)
    if (head := ppo.actor_critic.value_head) is not None:  # values of 0 would explain the same of every part
        with torch.no_grad():
            head.weight.copy_(divided_like(torch.linspace(-0.5, 0.5, head.weight.numel())[None], head.weight))
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as alone:
        # Every process samples everything: counted once, not once for each process (whitening divides by n - 1).
        alone.setattr(ppo, "reduce", lambda tensor: tensor)
        experience = ppo.collect(prompts.prompts[:PROMPTS])
    tokens = experience.episodes.sampled.view(4, -1, experience.episodes.sampled.shape[1]).sum(dim=(1, 2))
    assert len(set(tokens.tolist())) > 1
    assert tokens[:2].sum() != tokens[2:].sum()
    # Only the update is cut into micro-batches: the experience is the same to the last bit.
    ppo.config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, micro_batch_size=micro))
    count = PROMPTS * GENERATIONS // processes
    metrics = ppo.update(rows_of(experience, slice(process * count, (process + 1) * count)))
    weights = {f"weight/{name}": value.detach().clone() for name, value in full_state(loaded.model).items()}
    whole = {name: torch.tensor(float(value)) for name, value in metrics.items()}
    return weights | whole | {"advantages": experience.targets.advantages}


def rows_of(value: Any, part: slice) -> Any:
    """Some of the answers of a dataclass of batched tensors and tuples."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: rows_of(getattr(value, field.name), part) for field in dataclasses.fields(value)}
        return type(value)(**fields)  # type: ignore[operator]
    if isinstance(value, dict):
        return {name: rows_of(one, part) for name, one in value.items()}
    return value[part] if isinstance(value, torch.Tensor | tuple) else value
