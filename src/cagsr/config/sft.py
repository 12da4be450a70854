"""Settings of ``cagsr sft``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cagsr.config.training import DataConfig, LoraConfig, ModelConfig, SaveDtype


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on prompt-completion pairs (TRL's SFTTrainer): a start for ``train``."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    """Folder for the trained model: weights, tokenizer, card."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    completion_column: str = "completion"
    """Column with the answer: text, or a list of chat messages."""
    from_scratch: bool = False
    """Start from random weights; the model folder then needs only a config.json and a tokenizer."""
    epochs: float = 1.0
    """Passes over the pairs."""
    steps: int | None = None
    """Gradient steps; overrides epochs."""
    batch_size: int = 32
    """Pairs per gradient step and process."""
    micro_batch_size: int | None = None
    """Pairs in memory at once (a divisor of batch_size); None: the whole batch."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-3 from scratch, 2e-4 with LoRA, 2e-5 else."""
    warmup_ratio: float = 0.03
    """Share of the steps with a rising learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm clipping."""
    max_length: int | None = None
    """Longest pair in tokens, end token included; None: the model's context."""
    long_pairs: Literal["error", "drop"] = "error"
    """What to do with a longer pair. drop says how many."""
    seed: int = 0
    """Seeds the order of the pairs and random weights."""
    save_every: int = 500
    """Steps between checkpoints (deleted once the final model is there); 0 keeps none, and nothing to resume."""
    save_dtype: SaveDtype = "auto"
    """Precision of the saved weights; auto takes the starting model's own. float32 keeps every digit of the training."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    overwrite: bool = False
    """Replace the result of another sft in this folder."""
