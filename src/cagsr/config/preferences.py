"""Settings of ``cagsr synthesize``, ``cagsr reward-model`` and ``cagsr dpo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cagsr.config.training import DataConfig, LoraConfig, ModelConfig, SaveDtype


@dataclass(frozen=True)
class CorruptionConfig:
    """How often each kind of mistake is made, relative to the others; 0 never makes it."""

    drop: float = 1.0
    """A dropped fact: a clause or sentence that says something of the prompt is left out."""
    swap: float = 1.0
    """A swapped fact: a passage of the prompt that the answer says becomes what another prompt has in its place."""
    invent: float = 1.0
    """An invented fact: a clause of another prompt's answer is put in."""
    repeat: float = 1.0
    """A phrase is said twice in a row."""
    truncate: float = 1.0
    """The answer breaks off."""
    other: float = 1.0
    """Another prompt's answer."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """Machine-made preference pairs: the answer of a supervised pair against the same answer with a mistake in it."""

    data: DataConfig
    output: str
    """JSONL file for the pairs: prompt, chosen, rejected, corruption."""
    completion_column: str = "completion"
    """Column with the answer: text, or a list with one chat message."""
    num_pairs: int | None = None
    """How many pairs to make, over the rows in random order (several times if need be); None: one for each row."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    seed: int = 0
    """Seeds the order of the rows and the mistakes."""


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model from preference pairs (TRL's RewardTrainer), for ``train --reward.models``."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    """Folder for the reward model: weights, tokenizer, card, metrics.json."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    chosen_column: str = "chosen"
    """Column with the better answer: text, or a list with one chat message."""
    rejected_column: str = "rejected"
    """Column with the worse answer."""
    num_pairs: int | None = None
    """Train on only so many pairs, drawn with the seed; the first 50 are among the first 100. None: all."""
    eval_data: str | None = None
    """File with pairs that the accuracy is measured on, columns as in the data; None: see held_out."""
    held_out: float = 0.1
    """Share of the prompts kept out of training, with all their pairs, to measure the accuracy on; 0 measures none."""
    epochs: float = 3.0
    """Passes over the pairs."""
    steps: int | None = None
    """Gradient steps; overrides epochs."""
    batch_size: int = 32
    """Pairs per gradient step and process."""
    micro_batch_size: int | None = None
    """Pairs in memory at once (a divisor of batch_size); None: the whole batch."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-3 with LoRA, 1e-4 else (as TRL recommends)."""
    center_rewards: float = 0.01
    """Weight of the squared sum of a pair's two scores, which keeps the scores around 0 (TRL's
    center_rewards_coefficient); 0 leaves it out."""
    warmup_ratio: float = 0.03
    """Share of the steps with a rising learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm clipping."""
    max_length: int | None = None
    """Longest prompt and answer in tokens; None: the model's context."""
    long_pairs: Literal["error", "drop"] = "error"
    """What to do with a longer pair. drop says how many."""
    seed: int = 0
    """Seeds the choice and order of the pairs, the held-out prompts and the head's first weights."""
    save_every: int = 500
    """Steps between checkpoints (deleted once the final model is there); 0 keeps none, and nothing to resume."""
    save_dtype: SaveDtype = "auto"
    """Precision of the saved weights; auto takes the starting model's own. float32 keeps every digit of the training."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    overwrite: bool = False
    """Replace the reward model in this folder."""


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation (TRL's DPOTrainer): preference pairs without a reward model and without sampling."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    """Folder for the trained model: weights, tokenizer, card."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    chosen_column: str = "chosen"
    """Column with the better answer: text, or a list with one chat message."""
    rejected_column: str = "rejected"
    """Column with the worse answer."""
    num_pairs: int | None = None
    """Train on only so many pairs, drawn with the seed; the first 50 are among the first 100. None: all."""
    beta: float = 0.1
    """How tightly the model is held to its start; higher is tighter."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """DPO's own loss (sigmoid), or one of its relatives."""
    label_smoothing: float = 0.0
    """Assumed share of pairs that are the wrong way round (sigmoid and robust)."""
    epochs: float = 1.0
    """Passes over the pairs."""
    steps: int | None = None
    """Gradient steps; overrides epochs."""
    batch_size: int = 32
    """Pairs per gradient step and process."""
    micro_batch_size: int | None = None
    """Pairs in memory at once (a divisor of batch_size); None: the whole batch."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-5 with LoRA, 1e-6 else (as TRL recommends). Small models need more."""
    warmup_ratio: float = 0.03
    """Share of the steps with a rising learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm clipping."""
    max_length: int | None = None
    """Longest prompt and answer in tokens, end token included; None: the model's context."""
    long_pairs: Literal["error", "drop"] = "error"
    """What to do with a longer pair. drop says how many."""
    seed: int = 0
    """Seeds the choice and order of the pairs."""
    save_every: int = 500
    """Steps between checkpoints (deleted once the final model is there); 0 keeps none, and nothing to resume."""
    save_dtype: SaveDtype = "auto"
    """Precision of the saved weights; auto takes the starting model's own. float32 keeps every digit of the training."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    overwrite: bool = False
    """Replace the result of another dpo in this folder."""
