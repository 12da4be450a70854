"""TRL's ``GRPOTrainer`` with our reward as a function, doing the same work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.turns import Turns
from benchmarks.workload import KL, LEARNING_RATE, LORA_ALPHA, TEMPERATURE, Work, read_prompts
from cagsr.integrations.trl import AttentionReward

MANY = 1_000_000


def run(work: Work, folder: Path, turns: Turns) -> None:
    """Step whenever it is our turn; a step is one generation and all optimizer steps on it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(work.device)
    with torch.no_grad():
        turns.policy_is_loaded(lambda: model(input_ids=torch.full((1, 8), 5, device=work.device)))
    accumulation = work.sequences // work.micro_batch
    reward = AttentionReward(micro_batch_size=work.micro_batch)
    counted = _Counted(reward)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=counted,
        args=GRPOConfig(
            output_dir=str(folder / "grpo"),
            num_generations=work.generations,
            max_completion_length=work.response,
            temperature=TEMPERATURE,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=accumulation,
            num_iterations=work.epochs,
            beta=KL,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=MANY,
            gradient_checkpointing=False,
            bf16=work.precision == "bfloat16",
            use_cpu=work.device == "cpu",
            logging_steps=MANY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            generation_kwargs={"min_new_tokens": work.response} if work.start else None,
        ),
        peft_config=LoraConfig(
            r=work.lora, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if work.lora
        else None,
        train_dataset=Dataset.from_dict({"prompt": read_prompts(folder)}),
        processing_class=tokenizer,
    )
    reward.bind(trainer)
    _time(trainer, "_generate", turns, "rollout")
    _time(trainer, "_generate_and_score_completions", turns, "scoring")
    trainer.add_callback(_TakesTurns(work, turns, counted))
    turns.begin()
    trainer.train()


class _Counted:
    """The reward, noting how many tokens it was asked to score."""

    __name__ = "attention_reward"

    def __init__(self, reward: AttentionReward) -> None:
        self._reward = reward
        self.tokens = 0

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float | None]:
        self.tokens = sum(len(ids) for ids in completion_ids)
        return self._reward(prompts, completions, completion_ids, **kwargs)


class _TakesTurns(TrainerCallback):
    def __init__(self, work: Work, turns: Turns, counted: _Counted) -> None:
        self._steps = work.epochs
        self._turns = turns
        self._counted = counted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps:
            return
        turns = self._turns
        turns.add("scoring", -turns.seconds("rollout"))
        turns.add("update", turns.elapsed() - turns.seconds("rollout") - turns.seconds("scoring"))
        turns.end(self._counted.tokens)
        turns.begin()


def _time(trainer: GRPOTrainer, method: str, turns: Turns, stage: str) -> None:
    original: Callable[..., Any] = getattr(trainer, method)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with turns.stage(stage):
            return original(*args, **kwargs)

    setattr(trainer, method, timed)
