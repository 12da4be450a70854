"""A whole step with LoRA at 7B: sample, score, reward, update."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.random_policy import random_policy, random_prompts
from benchmarks.gpu.setting import Keep, Setting


def measure(setting: Setting, keep: Keep) -> None:
    """One step to warm up, then one that counts."""
    from accelerate import Accelerator

    from cagsr.config import DataConfig, LoraConfig, ModelConfig, PPOConfig, RunConfig, SamplingConfig, TrainConfig
    from cagsr.reward.build import build_reward
    from cagsr.reward.registry import Resources
    from cagsr.training.ppo import PPO

    size, prompts, many, prompt, response = setting.pick(("7B", 4, 4, 256, 128), ("tiny", 2, 2, 8, 6))
    policy = random_policy(setting, size, prompt + response, lora_rank=16)
    weights = _allocated(setting)
    config = TrainConfig(
        model=ModelConfig("random"),
        data=DataConfig("none"),
        output_dir="none",
        lora=LoraConfig(r=16),
        sampling=SamplingConfig(num_generations=many, max_new_tokens=response, min_new_tokens=response),
        ppo=PPOConfig(estimator="rloo", num_ppo_epochs=1, micro_batch_size=setting.pick(8, 2)),
        run=RunConfig(batch_size=prompts, profile=True),
    )
    reward = build_reward(config.reward, device=policy.device, resources=Resources(policy.texts))
    ppo = PPO(config, policy, reward, Accelerator(cpu=setting.dry_run))
    encoded = random_prompts(policy, prompts, prompt)
    torch.manual_seed(2)
    ppo.update(ppo.collect(encoded))
    step: dict[str, Any] = {}

    def collect() -> None:
        step["experience"] = ppo.collect(encoded)

    def both() -> None:
        step["collect"] = setting.seconds(collect)
        step["update"] = setting.seconds(lambda: ppo.update(step["experience"]))

    peak = setting.peak_mebibytes(both)
    whole = step["collect"] + step["update"]
    keep(
        f"{size}, LoRA rank 16 on all-linear, RLOO, {prompts} prompts x {many} answers x ({prompt}+{response}) tokens",
        {
            "s": whole,
            "s, rollout and scoring": step["collect"],
            "s, update": step["update"],
            "tokens/s": int(step["experience"].episodes.sampled.sum()) / whole,
            "GiB of weights": None if weights is None else weights / 2**30,
            "GiB above them": None if peak is None else peak / 2**10,
        },
    )


def _allocated(setting: Setting) -> int | None:
    return None if setting.dry_run else int(torch.cuda.memory_allocated())
