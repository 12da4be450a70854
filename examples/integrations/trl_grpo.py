"""TRL's GRPOTrainer (or RLOOTrainer) with the attention reward.

    python -m examples.integrations.trl_grpo --output_dir trl-run --steps 3

Without ``--model`` and ``--data`` a tiny model with random weights is made in the output folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from cagsr import AttentionConfig
from cagsr.integrations.trl import AttentionReward
from examples.integrations import tiny_model


def main(arguments: list[str] | None = None) -> Any:
    """Train and print the rewards of each step; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="folder or Hub id; none: a tiny model")
    parser.add_argument("--data", help="JSONL file with a column prompt")
    parser.add_argument("--algorithm", choices=["grpo", "rloo"], default="grpo")
    parser.add_argument("--source", choices=["policy", "reference"], default="policy", help="whose attention is read")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max_completion_length", type=int, default=8)
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.data is None):
        parser.error("give --model and --data together, or neither of the two")
    model, data = options.model, options.data
    if model is None:
        model, data = map(str, tiny_model.save(options.output_dir))

    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[
        options.algorithm
    ]
    reward = AttentionReward(attention=AttentionConfig(source=options.source))
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(
            output_dir=str(options.output_dir),
            max_steps=options.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=options.max_completion_length,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=data, split="train"),
    )
    reward.bind(trainer)
    trainer.train()
    for row in trainer.state.log_history:
        if "reward" in row:
            spread, coverage = row["rewards/attention_reward/std"], row["attention_reward/grounded_coverage"]
            print(f"step {row['step']}: reward's deviation {spread:.3f}, grounded coverage {coverage:.3f}")
    return trainer


if __name__ == "__main__":
    main()
