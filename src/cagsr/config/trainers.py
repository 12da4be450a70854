"""Settings of the commands on TRL's trainers (``sft``, ``reward-model``, ``dpo``) and of ``synthesize``."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from cagsr.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    OutputFile,
    PositiveFloat,
    PositiveInt,
    Seed,
    ShareBelowOne,
)
from cagsr.config.training import DataConfig, LoraConfig, ModelConfig, SaveDtype


@dataclass(frozen=True)
class TrainerConfig:
    """What training on one of TRL's trainers has, whatever is trained."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    """Folder for the trained model: weights, tokenizer, card."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    epochs: PositiveFloat = 1.0
    """Passes over the pairs."""
    steps: PositiveInt | None = None
    """Gradient steps; overrides epochs."""
    batch_size: PositiveInt = 32
    """Pairs per gradient step and process."""
    micro_batch_size: PositiveInt | None = None
    """Pairs in memory at once (a divisor of batch_size); None: the whole batch."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate."""
    warmup_ratio: ShareBelowOne = 0.03
    """Share of the steps with a rising learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient norm clipping."""
    max_length: PositiveInt | None = None
    """Longest prompt and answer in tokens, end token included; None: the model's context."""
    long_pairs: Literal["error", "drop"] = "error"
    """What to do with a longer pair. drop says how many."""
    seed: Seed = 0
    """Seeds the choice and order of the pairs."""
    save_every: NonNegativeInt = 500
    """Steps between checkpoints (deleted once the final model is there); 0 keeps none, and nothing to resume."""
    save_dtype: SaveDtype = "auto"
    """Precision of the saved weights; auto takes the starting model's own. float32 keeps every digit of the training."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    overwrite: bool = False
    """Replace what another such training left in this folder."""

    usual_rates: ClassVar[tuple[float, float]]
    """Learning rates with LoRA and without."""

    @property
    def peak_learning_rate(self) -> float:
        """The one given, else the usual one of the command."""
        with_lora, without = self.usual_rates
        return self.learning_rate or (with_lora if self.lora.r > 0 else without)

    @property
    def micro(self) -> int:
        """Pairs in memory at once."""
        return self.micro_batch_size or self.batch_size

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.resume and self.overwrite:
            yield "--resume and --overwrite exclude each other: give one of them."
        if self.batch_size % self.micro:
            yield f"--micro_batch_size {self.micro} must divide --batch_size {self.batch_size}."
        if self.data.streaming:
            yield "--data.streaming: the pairs are shuffled, so all are read; use --data.limit for large sets."
        if self.lora.start is not None:
            yield "--lora.start: cagsr train alone goes on from an adapter; name the adapter's folder as --model.path."


@dataclass(frozen=True)
class SftConfig(TrainerConfig):
    """Supervised fine-tuning on prompt-completion pairs (TRL's SFTTrainer, for encoder-decoder models transformers'
    Seq2SeqTrainer): a start for ``train``.
    """

    learning_rate: PositiveFloat | None = None
    """Peak learning rate; None: 1e-3 from scratch, 2e-4 with LoRA, 2e-5 else."""
    max_length: PositiveInt | None = None
    """Longest pair in tokens, end token included (of an encoder-decoder its prompt and its answer, each); None: the model's
    context."""
    seed: Seed = 0
    """Seeds the order of the pairs and random weights."""
    overwrite: bool = False
    """Replace the result of another sft in this folder."""
    completion_column: str = "completion"
    """Column with the answer: text, or a list of chat messages."""
    from_scratch: bool = False
    """Start from random weights; the model folder then needs only a config.json and a tokenizer."""

    @property
    def peak_learning_rate(self) -> float:
        """The one given, else the usual."""
        return self.learning_rate or (2e-4 if self.lora.r > 0 else 1e-3 if self.from_scratch else 2e-5)


@dataclass(frozen=True)
class PreferenceConfig(TrainerConfig):
    """What training on preference pairs has."""

    chosen_column: str = "chosen"
    """Column with the better answer: text, or a list with one chat message."""
    rejected_column: str = "rejected"
    """Column with the worse answer."""
    num_pairs: PositiveInt | None = None
    """Train on only so many pairs, drawn with the seed; the first 50 are among the first 100. None: all."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        yield from super().conflicts()
        if self.data.split_text:
            yield "--data.split_text: a preference row has its answers in columns; leave it at 0."


@dataclass(frozen=True)
class RewardModelConfig(PreferenceConfig):
    """A reward model from preference pairs (TRL's RewardTrainer), for ``train --reward.models``."""

    output_dir: str
    """Folder for the reward model: weights, tokenizer, card, metrics.json."""
    epochs: PositiveFloat = 3.0
    """Passes over the pairs."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate; None: 1e-3 with LoRA, 1e-4 else (as TRL recommends)."""
    max_length: PositiveInt | None = None
    """Longest prompt and answer in tokens; None: the model's context."""
    seed: Seed = 0
    """Seeds the choice and order of the pairs, the held-out prompts and the head's first weights."""
    overwrite: bool = False
    """Replace the reward model in this folder."""
    eval_data: str | None = None
    """File with pairs that the accuracy is measured on, columns as in the data; None: see held_out."""
    held_out: ShareBelowOne = 0.1
    """Share of the prompts kept out of training, with all their pairs, to measure the accuracy on; 0 measures none."""
    center_rewards: NonNegativeFloat = 0.01
    """Weight of the squared sum of a pair's two scores, which keeps the scores around 0 (TRL's
    center_rewards_coefficient); 0 leaves it out."""
    usual_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-4)


@dataclass(frozen=True)
class DpoConfig(PreferenceConfig):
    """Direct preference optimisation (TRL's DPOTrainer): preference pairs without a reward model and without sampling."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate; None: 1e-5 with LoRA, 1e-6 else (as TRL recommends). Small models need more."""
    overwrite: bool = False
    """Replace the result of another dpo in this folder."""
    beta: PositiveFloat = 0.1
    """How tightly the model is held to its start; higher is tighter."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """DPO's own loss (sigmoid), or one of its relatives."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs that are the wrong way round (sigmoid and robust)."""
    usual_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-6)


@dataclass(frozen=True)
class CorruptionConfig:
    """How often each kind of mistake is made, relative to the others; 0 never makes it."""

    drop: NonNegativeFloat = 1.0
    """A dropped fact: a clause or sentence that says something of the prompt is left out."""
    swap: NonNegativeFloat = 1.0
    """A swapped fact: a passage of the prompt that the answer says becomes what another prompt has in its place."""
    invent: NonNegativeFloat = 1.0
    """An invented fact: a clause of another prompt's answer is put in."""
    repeat: NonNegativeFloat = 1.0
    """A phrase is said twice in a row."""
    truncate: NonNegativeFloat = 1.0
    """The answer breaks off."""
    other: NonNegativeFloat = 1.0
    """Another prompt's answer."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if not any(astuple(self)):
            yield "--corruption: every weight is 0; give at least one kind of mistake a weight above 0."


@dataclass(frozen=True)
class SynthesizeConfig:
    """Machine-made preference pairs: the answer of a supervised pair against the same answer with a mistake in it."""

    data: DataConfig
    output: OutputFile
    """JSONL file for the pairs: prompt, chosen, rejected, corruption."""
    completion_column: str = "completion"
    """Column with the answer: text, or a list with one chat message."""
    num_pairs: PositiveInt | None = None
    """How many pairs to make, over the rows in random order (several times if need be); None: one for each row."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    seed: Seed = 0
    """Seeds the order of the rows and the mistakes."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.data.streaming:
            yield "--data.streaming: facts are taken from other rows, so all are read; use --data.limit."
