"""TRL's ``PPOTrainer``, doing the same work.

TRL took its PPO out in 1.13, so the last version that has it lies in a folder of its own beside the installed TRL.
Its trainer wants a reward model and a value model. The reward model here is one number per token, read from a table: it
costs nothing. The value model is a value head on the policy's own backbone, as ours, which the trainer runs a second time
(``shared``); or, as TRL's example does it, a second network of the policy's size (``separate``).
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.turns import Turns
from benchmarks.workload import KL, LEARNING_RATE, STOP, TEMPERATURE, Work, read_prompts

VERSION = "1.12.0"
FOLDER = Path(__file__).parent.parent / ".trl"
INSTALL = f"python -m pip install --no-deps --target benchmarks/.trl trl=={VERSION}"
MANY = 1_000_000


def is_installed() -> bool:
    """Whether the TRL that has ``PPOTrainer`` lies in its folder."""
    return (FOLDER / "trl" / "experimental" / "ppo").is_dir()


def run(work: Work, folder: Path, turns: Turns, value: str = "shared") -> None:
    """Step whenever it is our turn."""
    sys.path.insert(0, str(FOLDER))
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        turns.policy_is_loaded(lambda: policy(input_ids=torch.full((1, 8), 5)))
    rows = [ids for ids in tokenizer(read_prompts(folder))["input_ids"] for _ in range(work.generations)]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "ppo"),
            num_ppo_epochs=work.epochs,
            num_mini_batches=1,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.sequences // work.micro_batch,
            local_rollout_forward_batch_size=work.sequences,
            response_length=work.response,
            stop_token="eos",
            missing_eos_penalty=1.0,
            temperature=TEMPERATURE,
            kl_coef=KL,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            total_episodes=MANY * work.sequences,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False),
        reward_model=_TableReward(work.vocabulary),
        value_model=_HeadOnPolicy(policy) if value == "shared" else _separate(folder),
        # Every step sees all rows, in an order of its own.
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:1]}),
    )
    clock = _Clock(turns)
    ppo_trainer.batch_generation = clock.rollout(ppo_trainer.batch_generation)
    trainer.model.register_forward_pre_hook(clock.update_begins)
    trainer.callback_handler.add_callback(clock)
    turns.begin()
    trainer.train()


class _Clock(TrainerCallback):
    """Takes the turns; tells rollout, scoring (until the first training forward) and update apart."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._tokens = 0
        self._rolled_out = 0.0
        self._updating: float | None = None

    def rollout(self, original: Any) -> Any:
        """Time the rollout and count its tokens."""

        @functools.wraps(original)
        def timed(model: Any, queries: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self._turns.stage("rollout"):
                found = original(model, queries, *args, **kwargs)
            responses = found[0][:, queries.shape[1] :]
            before = (responses == STOP).cumsum(1) - (responses == STOP).long()
            self._tokens = int((before == 0).sum())
            self._rolled_out, self._updating = time.perf_counter(), None
            return found

        return timed

    def update_begins(self, *_: Any) -> None:
        """The wrapped policy and value model are called as one for the first time in this step."""
        if self._updating is None:
            self._updating = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._updating is not None
        self._turns.add("scoring", self._updating - self._rolled_out)
        self._turns.add("update", time.perf_counter() - self._updating)
        self._turns.end(self._tokens)
        self._turns.begin()


class _HeadOnPolicy(nn.Module):
    """A value head on the policy's backbone, in the shape TRL takes."""

    base_model_prefix = "backbone"

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.backbone = policy.model
        self.score = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


def _separate(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


class _TableReward(nn.Module):
    """A random number for each last token, in the shape TRL takes."""

    base_model_prefix = "backbone"

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.backbone = _Table(vocabulary)
        self.score = nn.Identity()


class _Table(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 1)

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(hidden_states=(self.table(input_ids),))
