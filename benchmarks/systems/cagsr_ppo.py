"""Our loop: ``PPO.collect`` and ``PPO.update``, as ``cagsr train`` calls them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.turns import Turns
from benchmarks.workload import KL, LEARNING_RATE, LORA_ALPHA, TEMPERATURE, Work
from cagsr.config import (
    AttentionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.build import build_reward
from cagsr.reward.registry import Resources
from cagsr.training.ppo import PPO


def config_of(work: Work, folder: Path, estimator: str = "gae", critic: str = "head") -> TrainConfig:
    """The settings of ``cagsr train`` that do this work.

    Args:
        work: sizes.
        folder: starting model and prompts.
        estimator: ``gae`` (a value head and the KL in the reward, as TRL's PPO) or ``grpo`` (the KL in the loss, as
            TRL's GRPO).
        critic: ``head`` or ``model``, for gae.
    """
    grpo = estimator == "grpo"
    ppo = PPOConfig(
        estimator=estimator,  # type: ignore[arg-type]
        critic=critic,  # type: ignore[arg-type]
        num_ppo_epochs=work.epochs,
        num_mini_batches=1,
        micro_batch_size=work.micro_batch,
        learning_rate=LEARNING_RATE,
        value_learning_rate=LEARNING_RATE,
        kl_coef=KL,
        kl_in="loss" if grpo else "reward",
        kl_estimator="k3" if grpo else "k1",
    )
    return TrainConfig(
        model=ModelConfig(str(folder), device=work.device, dtype=work.precision),
        data=DataConfig(str(folder / "prompts.jsonl")),
        output_dir=str(folder / "run"),
        sampling=SamplingConfig(
            num_generations=work.generations,
            max_new_tokens=work.response,
            min_new_tokens=work.response if work.start else 0,
            temperature=TEMPERATURE,
        ),
        lora=LoraConfig(r=work.lora, alpha=LORA_ALPHA),
        attention=AttentionConfig(layers=work.layers),
        ppo=ppo,
        run=RunConfig(batch_size=work.prompts),
    )


def run(work: Work, folder: Path, turns: Turns, estimator: str = "gae", critic: str = "head") -> None:
    """Step whenever it is our turn."""
    config = config_of(work, folder, estimator, critic)
    loaded = load_model(config.model, config.lora)
    with torch.no_grad():
        turns.policy_is_loaded(lambda: loaded.model(input_ids=torch.full((1, 8), 5, device=loaded.device)))
    room = loaded.room_for_prompts(work.response)
    prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=room).prompts
    reward = build_reward(config.reward, device=loaded.device, resources=Resources(loaded.texts))
    ppo = PPO(config, loaded, reward, Accelerator(cpu=work.device == "cpu"))
    scoring_begins = _moment_of(ppo.scorer, "policy")
    torch.manual_seed(2)
    while True:
        turns.begin()
        experience = ppo.collect(prompts)
        rollout = turns.elapsed() - (time.perf_counter() - scoring_begins())
        turns.add("rollout", rollout)
        turns.add("scoring", turns.elapsed() - rollout)
        with turns.stage("update"):
            ppo.update(experience)
        turns.end(int(experience.episodes.sampled.sum()))


def _moment_of(owner: object, name: str) -> Callable[[], float]:
    """Note when a method was last called: what comes before scoring is the rollout."""
    original: Callable[..., Any] = getattr(owner, name)
    called = [0.0]

    @functools.wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        called[0] = time.perf_counter()
        return original(*args, **kwargs)

    setattr(owner, name, noted)
    return lambda: called[0]
