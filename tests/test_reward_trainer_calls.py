"""Reward functions written for TRL's trainers that ask for the trainer: its state, log_metric, log_extra, coroutines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from trl import GRPOConfig, GRPOTrainer

import tiny
from cagsr.commands.main import main
from cagsr.config import RewardConfig
from cagsr.errors import ConfigError, RewardError
from cagsr.flow import RewardBatch
from cagsr.integrations.trl import AttentionReward
from cagsr.reward.trainer_calls import TrainerCalls
from cagsr.reward.user_functions import load_function

MakeBatch = Callable[..., RewardBatch]

MODULE = '''
import asyncio

seen, loops = [], []

def curriculum(prompts, completions, trainer_state, log_metric, log_extra, **kwargs):
    """What TRL's documentation shows: shaping by progress, metrics and columns of one's own."""
    seen.append((trainer_state.global_step, trainer_state.max_steps, len(trainer_state.log_history)))
    lengths = [len(text.split()) for text in completions]
    log_metric("words", sum(lengths) / len(lengths))
    log_metric("twice", 1.0)
    log_metric("twice", 2.0)
    log_extra("length", lengths)
    log_extra("prompt again", prompts)
    return [trainer_state.global_step / trainer_state.max_steps * length for length in lengths]

async def judge(completions, log_metric, **kwargs):
    """Keeps something that belongs to its loop, as an HTTP session does."""
    loops.append(asyncio.get_running_loop())
    await asyncio.sleep(0.001)
    log_metric("judged", float(len(completions)))
    return [None if index == 0 else float(index) for index in range(len(completions))]

class Judge:
    __name__ = "Judge"
    async def __call__(self, completions, **kwargs):
        return [1.5] * len(completions)

def by_progress(trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(kwargs["completions"])

def text(completions, log_metric, **kwargs):
    log_metric("name", "long")
    return [0.0] * len(completions)

def one_value(completions, log_extra, **kwargs):
    log_extra("kind", ["a"])
    return [0.0] * len(completions)

def logs_kind(completions, log_extra, **kwargs):
    log_extra("kind", ["a"] * len(completions))
    return [0.0] * len(completions)

def logs_kind_too(completions, log_extra, **kwargs):
    return logs_kind(completions, log_extra)

def logs_twice(completions, log_extra, **kwargs):
    return logs_kind(completions, log_extra) + logs_kind(completions, log_extra)

def ours(completions, log_metric, **kwargs):
    log_metric("objective/kl", 0.0)
    return [float(len(text)) for text in completions]

def in_environments(completions, environments):
    return [0.0] * len(completions)

async def on_batch(batch):
    return 0
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "trl_rewards_for_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    import_it = load_function("trl_rewards_for_test.curriculum")
    assert import_it.name == "curriculum"
    yield sys.modules["trl_rewards_for_test"]
    sys.modules.pop("trl_rewards_for_test", None)


def load(name: str) -> Any:
    return load_function(f"trl_rewards_for_test.{name}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_told_where_training_stands_and_what_it_logs_is_kept(module: Any, make_reward_batch: MakeBatch):
    calls = TrainerCalls(TrainerState(max_steps=4))
    batch = replace(make_reward_batch(prompts=1, generations=3), trainer=calls)
    calls.begin(2, 0.5)
    assert load("curriculum")(batch).values.tolist() == [1.0, 1.0, 1.0]  # "answer 0": 2 words, 2 of 4 steps done
    assert calls.metrics == {"words": [2.0], "twice": [1.0, 2.0]}
    assert calls.extra == {"length": [2, 2, 2], "prompt again": ["prompt 1"] * 3}
    # Another process logged other names, or the same.
    other = [("twice", [4.0, 5.0]), ("alone", [7.0])]
    assert calls.averages(lambda mine: [*mine, *other], {"objective/kl"}) == {"alone": 7.0, "twice": 3.0, "words": 2.0}
    calls.begin(3, 0.75)
    assert (calls.metrics, calls.extra, calls.state.global_step, calls.state.epoch) == ({}, {}, 3, 0.75)


def test_where_nothing_is_trained_it_is_the_end_of_a_training(module: Any, make_reward_batch: MakeBatch):
    batch = make_reward_batch(prompts=1, generations=2)
    assert load("curriculum")(batch).values.tolist() == [2.0, 2.0]
    assert load("by_progress")(batch).values.tolist() == [1.0, 1.0]


def test_coroutine_functions_are_awaited_in_one_loop(module: Any, make_reward_batch: MakeBatch):
    calls = TrainerCalls(TrainerState())
    batch = replace(make_reward_batch(prompts=1, generations=3), trainer=calls)
    values = load("judge")(batch)
    assert values.applies.tolist() == [False, True, True]
    assert values.values[1:].tolist() == [1.0, 2.0]
    assert load("Judge")(batch).values.tolist() == [1.5, 1.5, 1.5]
    load("judge")(batch)
    assert module.loops[0] is module.loops[1]
    assert calls.metrics == {"judged": [3.0, 3.0]}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["text"], r"function 'text' called log_metric\('name', 'long'\): give a number"),
        (["one_value"], r"'one_value' called log_extra\('kind'\) with 1 values for 3 answers"),
        (["logs_kind", "logs_kind_too"], r"'logs_kind_too' called log_extra\('kind'\), a column that 'logs_kind' has"),
        (["logs_twice"], r"'logs_twice' called log_extra\('kind'\), a column that it has logged already"),
    ],
)
def test_what_can_not_be_logged(module: Any, make_reward_batch: MakeBatch, names: list[str], words: str):
    batch = replace(make_reward_batch(prompts=1, generations=3), trainer=TrainerCalls(TrainerState()))
    for name in names[:-1]:
        load(name)(batch)
    with pytest.raises(RewardError, match=words):
        load(names[-1])(batch)


def test_what_can_not_be_asked_for(module: Any):
    with pytest.raises(ConfigError, match="environments, which TRL's trainers make of an environment_factory"):
        load("in_environments")
    with pytest.raises(ConfigError, match="coroutine function of a batch"):
        load("on_batch")


def train(start: Path, run: Path, *more: str) -> int:
    small = "--run.batch_size 3 --sampling.num_generations 2 --sampling.max_new_tokens 5 --evaluation.held_out 2"
    argv = [
        "train",
        "--model",
        str(start),
        "--data",
        "prompts.jsonl",
        "--output_dir",
        str(run),
        "--model.device",
        "cpu",
    ]
    return main([*argv, *small.split(), "--ppo.num_ppo_epochs", "1", "--run.save_every", "1", *more])


def test_a_run_tells_and_keeps_as_trl_does(module: Any, tmp_path: Path):
    start, run = tiny.save_model(tmp_path / "start"), tmp_path / "run"
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    functions = ["--reward.functions", "trl_rewards_for_test.curriculum", "trl_rewards_for_test.judge"]
    assert train(start, run, *functions, "--steps", "2") == 0
    assert [one[:2] for one in module.seen] == [(0, 2), (1, 2)]  # steps that are done, as in TRL
    assert [one[2] for one in module.seen] == [1, 2]  # the evaluation of the start, then the first step
    metrics = lines(run / "metrics.jsonl")
    assert [row.get("twice") for row in metrics] == [None, 1.5, 1.5]
    assert [row.get("judged") for row in metrics[1:]] == [6.0, 6.0]
    rows = [row for row in lines(run / "samples.jsonl") if row["step"] == 1]
    assert rows
    for row in rows:
        assert row["extra"] == {"length": len(row["completion"].split()), "prompt again": row["prompt"]}
    assert metrics[1]["words"] > 0

    # A resumed run tells the same history.
    longer = [*functions, "--steps", "3", "--run.resume"]
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 2", "steps: 3"))
    assert train(start, run, *longer) == 0
    assert module.seen[2] == (2, 3, 3)

    # The same functions inside TRL's trainer see and log the same kinds of things.
    module.seen.clear()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        reward_funcs=[module.curriculum, module.judge],
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=6,
            num_generations=2,
            max_completion_length=5,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(lines(tmp_path / "prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    assert [one[:2] for one in module.seen] == [(0, 2), (1, 2)]
    assert [row.get("twice") for row in trainer.state.log_history[:2]] == [1.5, 1.5]
    assert [row.get("judged") for row in trainer.state.log_history[:2]] == [6.0, 6.0]


def test_a_name_of_ours_is_refused_and_the_run_can_go_on(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start = tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    assert train(start, tmp_path / "run", "--reward.functions", "trl_rewards_for_test.ours", "--steps", "1") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "step 1: a reward function called log_metric('objective/kl'), which is a metric of ours: rename it" in said
    assert "Traceback" not in said


def test_inside_the_attention_reward_it_gets_the_trainers_own(module: Any, tmp_path: Path):
    """Micro-batches of ours are one call for TRL's log, and answers without a token keep their place."""
    start = tiny.save_model(tmp_path / "start")
    reward = AttentionReward(
        RewardConfig(functions=["trl_rewards_for_test.curriculum"], function_weights=[1.0]), micro_batch_size=2
    )
    texts = ["tell me about the red cat", "tell me about the blue dog near a tree"]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, num_generations=2, max_steps=5, bf16=False,
            use_cpu=True, report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    reward.bind(trainer)
    trainer.state.max_steps = 5
    logged: dict[str, list[Any]] = {}
    columns: dict[str, list[Any]] = {}
    found = reward(
        prompts=[texts[0], texts[0], texts[1], texts[1]],
        completions=["the cat", "", "a dog sees", "food"],
        completion_ids=[[4, 6], [], [5, 7, 11], [23]],
        trainer_state=trainer.state,
        log_metric=lambda name, value: logged.setdefault(name, []).append(value),
        log_extra=lambda column, values: columns.setdefault(column, []).extend(values),
    )
    assert found[1] is None
    assert columns["length"] == [2, None, 3, 1]
    assert logged["words"] == [2.5, 1.0]
    assert module.seen[0][:2] == (0, 5)
