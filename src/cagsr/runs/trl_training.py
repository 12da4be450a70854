"""Training on TRL's trainers: what sft, reward-model and dpo share, whatever is trained on whatever pairs."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cagsr import __version__
from cagsr.config import RewardModelConfig, SftConfig, TrainerConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.models.generation import ending_as
from cagsr.models.hearing import Hearing
from cagsr.models.load import LoadedModel
from cagsr.runs.final import render_card
from cagsr.runs.numbers import StepNumbers
from cagsr.runs.saved import (
    DIFFERS,
    Probe,
    Saved,
    chosen_dtype,
    dtype_note,
    save_adapter_compared,
    save_compared,
    saved_facts,
)
from cagsr.runs.trainer_folder import CHECKPOINTS, check_trainer_config, open_trainer_folder, settings_file, write_model
from cagsr.support.atomic import delete, disk_errors
from cagsr.support.progress import Task, now, say, shown, working

ConfigT = TypeVar("ConfigT", bound=TrainerConfig)

RECENT = 50
"""Steps over which what a training logs is averaged."""


@dataclass(frozen=True)
class Training:
    """What one of the commands trains, with what, and what it tells of it."""

    trainer: Callable[..., Any]
    """Makes one of TRL's or transformers' trainers of what all have: ``args``, ``train_dataset``, ``processing_class``."""
    arguments: Callable[..., Any]
    """Makes its arguments of what all set."""
    rows: Sequence[Mapping[str, Any]]
    dropped: int
    """Pairs that were too long."""
    notes: Sequence[str]
    """Worth saying of the pairs."""
    probe: Probe
    describe: Callable[[Any, Saved], Outcome]
    """From the trainer and what was saved, what is told of them. Called before the folder is complete: an interrupted
    training must not look finished."""
    # For the card: how it begins, the library's trainer, what the model is not good for, and the Hub's name of what it is used for.
    what: str
    library: str
    limits: str
    task: str = "text-generation"
    adapter: bool = True
    """False: an adapter alone is of no use, its base being kept nowhere."""


@dataclass(frozen=True)
class Outcome:
    """What a command tells of a training beside its length and its loss: on the card, at the end, in text files by name."""

    facts: Sequence[str]
    measures: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def train_with_trl(
    config: ConfigT,
    command: str,
    load: Callable[[ConfigT], LoadedModel],
    prepare: Callable[[ConfigT, LoadedModel, int | None], Training],
    *,
    quiet: bool,
) -> Path:
    """Check, load, prepare; then open the output folder, train, save what was trained, and say how it went unless ``quiet``.

    ``load`` gives the starting model, with its adapters if it is trained as it is; ``prepare`` reads and encodes the pairs, its
    last argument being the longest text in tokens (None: any). Gives the output folder, a model in Hugging Face layout.

    Raises:
        CagsrError: bad input; an output folder that holds something else; what was saved is not what was trained (the
            checkpoints then stay).
    """
    check_trainer_config(config, command)
    torch.manual_seed(config.seed)  # fresh adapters, and rows of a vocabulary that grows
    loaded = load(config)
    _check_start(config, loaded, command)
    limit = _length_limit(config, loaded)
    training = prepare(config, loaded, limit)
    notes = [*loaded.notes, f"{len(training.rows):,} pairs from {config.data.path}.", *training.notes]
    notes.append(dtype_note(config.save_dtype, loaded, "--save_dtype"))
    if training.dropped:
        notes.append(
            f"{training.dropped:,} pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop)."
        )
    folder = Path(config.output_dir)
    checkpoint = open_trainer_folder(config, command, notes)
    with warnings.catch_warnings():
        # TRL's own default uses a name that transformers has renamed; the new one is unknown to older versions.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*checkpointing.*")
        args = training.arguments(**_arguments(config, loaded))
    trainer = training.trainer(
        args=args, train_dataset=Dataset.from_list(list(training.rows)), processing_class=loaded.tokenizer
    )
    _run(trainer, folder, checkpoint, notes, quiet=quiet)
    if trainer.is_world_process_zero():
        measures: list[str] = []

        def texts(saved: Saved) -> dict[str, str]:
            outcome = training.describe(trainer, saved)
            measures.extend(outcome.measures)
            card = render_card(
                "trainer_card.md.jinja",
                training=training,
                command=command,
                name=folder.name,
                version=__version__,
                facts=outcome.facts,
                steps=trainer.state.global_step,
                config=config,
                loss=mean_of(trainer, "loss"),
                saved=saved_facts(loaded, saved),
                settings=settings_file(command),
            )
            return {"README.md": card, **outcome.files}

        saved = save_trained(trainer, config, loaded, training.probe, texts, adapter=training.adapter)
        if not quiet:
            print(saved.sentence)
            _say_done(trainer, folder, *measures)
    return folder


def _check_start(config: TrainerConfig, loaded: LoadedModel, command: str) -> None:
    """Refuse what can't be trained: by TRL encoder-decoder models and adapters on the output head; answers that never end."""
    if isinstance(loaded.vision, Hearing):
        raise ModelError(
            f"--model {config.model.path} hears, and {command} trains on texts; teach it with transformers' Seq2SeqTrainer."
        )
    if not loaded.architecture.one_sequence and not isinstance(config, SftConfig):
        raise ModelError(
            f"--model {config.model.path} is an encoder-decoder model, and {command} (TRL) trains decoder-only ones; start with "
            "cagsr sft, then go on with cagsr train."
        )
    if loaded.tokenizer.eos_token_id is None and not isinstance(config, RewardModelConfig):
        raise ModelError(f"--model {config.model.path}: the tokenizer names no EOS token, so no answer could ever end.")
    if (
        loaded.lora
        and loaded.architecture.one_sequence
        and isinstance(loaded.model.get_output_embeddings(), BaseTunerLayer)
    ):
        raise ConfigError(
            # TRL reads the head's weight directly.
            f"--lora.target_modules {config.lora.target_modules}: {command} (TRL) can't train an adapter on the output head "
            "(lm_head); leave it out."
        )


def _length_limit(config: TrainerConfig, loaded: LoadedModel) -> int | None:
    """The longest text in tokens: ``--max_length``, else the model's context; None where neither states one."""
    context = loaded.context_length()
    if config.max_length is None:
        return context
    if context is not None and config.max_length > context:
        raise ConfigError(f"--max_length {config.max_length}: the model's context is only {context} tokens.")
    return config.max_length


def _arguments(config: TrainerConfig, loaded: LoadedModel) -> dict[str, Any]:
    """The arguments that transformers' Trainer takes from our settings, whatever is trained."""
    return {
        "output_dir": str(Path(config.output_dir) / CHECKPOINTS),
        "num_train_epochs": config.epochs,
        "max_steps": config.steps if config.steps is not None else -1,
        "per_device_train_batch_size": config.micro,
        "gradient_accumulation_steps": config.batch_size // config.micro,
        "learning_rate": config.peak_learning_rate,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a share of the steps
        "lr_scheduler_type": config.lr_scheduler if config.lr_scheduler != "constant" else "constant_with_warmup",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta2": 0.98,
        "bf16": loaded.compute_dtype == torch.bfloat16,
        "use_cpu": loaded.device.type == "cpu",
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "seed": config.seed,
        "data_seed": config.seed,
        "disable_tqdm": True,
        "logging_steps": 1,  # TRL brings its numbers together at every step anyway
        "report_to": "none",
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 1,
        "save_total_limit": 1,
    }


def _run(trainer: Any, folder: Path, checkpoint: str | None, notes: Sequence[str], *, quiet: bool) -> None:
    """Train with the house's progress in place of transformers' own; ``notes`` are said first, unless ``quiet``."""
    # The trainer puts its tokens into the model's generation config, and what it has changed it doesn't save where published
    # models have what transformers calls invalid. Nothing is generated here: another one takes its place meanwhile.
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = GenerationConfig()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        with nullcontext() if quiet else shown(f"training {folder}"), working("step") as task, disk_errors(folder):
            if not quiet and trainer.is_world_process_zero():
                for note in notes:
                    say(note)
            trainer.add_callback(_Progress(task))
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if own is not None:
            model.generation_config = own


class _Progress(TrainerCallback):
    """Tells the house's progress what transformers' Trainer has done."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._numbers = StepNumbers(task)
        self._step = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task.begin(state.max_steps, state.global_step, now())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts = args.gradient_accumulation_steps
        if parts > 1:  # such a step can take minutes
            self._part = self._step.enter_context(working("forward and backward", parts, "batches"))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._part.advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step.close()
        self._numbers.step(state.global_step, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._numbers.step(state.global_step, numbers)


def save_trained(
    trainer: Any,
    config: TrainerConfig,
    loaded: LoadedModel,
    probe: Probe,
    texts: Callable[[Saved], Mapping[str, str]],
    *,
    adapter: bool = True,
) -> Saved:
    """Write the trained model into the output folder once it has been loaded again and compared, and drop the checkpoints.

    With LoRA the adapter goes to ``adapter/``, and the model has it merged.
    """
    folder = Path(config.output_dir)
    kept = folder / DIFFERS
    delete(kept)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    model.config.use_cache = True
    # TRL and accelerate put functions in a forward's place: lower precision, and running the model rather than its copy.
    for part in (model, model.get_base_model()) if isinstance(model, PeftModel) else (model,):
        vars(part).pop("forward", None)
    if isinstance(model, PeftModel):
        if "ref" in model.peft_config:  # DPOTrainer's own: a frozen copy of the untrained adapter
            model.delete_adapter("ref")
        if adapter:
            save_adapter_compared(folder / "adapter", model, loaded, probe, kept=kept)

    def fill(temporary: Path) -> Saved:
        dtype, ending = chosen_dtype(config.save_dtype, loaded), ending_as(loaded)
        return save_compared(temporary, model, loaded, probe, dtype, ending, texts=texts, place=folder, kept=kept)

    saved = write_model(folder, fill)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return saved


def mean_of(trainer: Any, name: str, *, first: bool = False) -> float | None:
    """Mean of what was logged under ``name`` in the last (or the first) steps, at most ``RECENT``; None: never logged.

    Of a short training it is half of the steps, so that the first and the last are two things.
    """
    found = [float(entry[name]) for entry in trainer.state.log_history if name in entry]
    count = min(RECENT, max(1, len(found) // 2))
    some = found[:count] if first else found[-count:]
    return sum(some) / len(some) if some else None


def _say_done(trainer: Any, folder: Path, *measures: str) -> None:
    """Say where the model is and how the training went, on standard output: its loss, and ``measures`` beside it."""
    steps, loss = trainer.state.global_step, mean_of(trainer, "loss")
    told = [f"{steps:,} {'step' if steps == 1 else 'steps'}"]
    if loss is not None:
        told.append(f"training loss {mean_of(trainer, 'loss', first=True):.3f} at first, {loss:.3f} at last")
    print(f"Done: the model is in {folder}. {', '.join((*told, *measures))}.", flush=True)
