"""Supervised fine-tuning on TRL's SFTTrainer: the start for reinforcement learning, where there are pairs."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from cagsr import __version__
from cagsr.config import ModelConfig, SftConfig
from cagsr.configfile import to_yaml
from cagsr.errors import ConfigError, ModelError, RunError
from cagsr.models.load import LoadedModel, load_model
from cagsr.pairs import encode_pairs
from cagsr.runs.atomic import disk_errors, replace_folder, write_text_atomically
from cagsr.runs.progress import TrainingProgress

SETTINGS = "sft.yaml"
CHECKPOINTS = "checkpoints"


def sft(config: SftConfig, *, quiet: bool = False) -> Path:
    """Fine-tune a decoder-only model on prompt-completion pairs and save it in Hugging Face layout.

    The loss is on the completions only, each ended by the end token; nothing is packed. With LoRA the saved model is the
    merged one and ``adapter/`` holds the adapter alone.

    Args:
        config: see ``SftConfig``.
        quiet: print nothing (the quickstart shows its own progress).

    Returns:
        The output folder.

    Raises:
        CagsrError: bad input, in one sentence (see ``load_model`` and ``encode_pairs``); an output folder that holds
            something else; an encoder-decoder model.
    """
    folder = Path(config.output_dir)
    _check(config, folder)
    loaded = _load(config)
    limit = _length_limit(config, loaded)
    pairs, dropped = encode_pairs(config, loaded.tokenizer, limit)
    notes = [*loaded.notes, f"{len(pairs):,} pairs from {config.data.path}."]
    if dropped:
        notes.append(f"{dropped:,} pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop).")
    checkpoint = _open(folder, config)
    trainer = SFTTrainer(
        model=loaded.model,
        args=_arguments(config, loaded, folder, limit),
        train_dataset=Dataset.from_list(pairs),
        processing_class=loaded.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    progress = _Progress(notes)
    if not quiet:
        trainer.add_callback(progress)
    try:
        with disk_errors(folder):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        _save(folder, loaded, trainer, _card(config, len(pairs), trainer.state.global_step, losses))
    return folder


def _check(config: SftConfig, folder: Path) -> None:
    """Refuse settings that contradict each other and folders that hold something else, before anything is loaded."""
    if config.resume and config.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: give one of them.")
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size < 1 or micro < 1 or config.batch_size % micro:
        raise ConfigError(f"--micro_batch_size {micro} must divide --batch_size {config.batch_size}.")
    if (config.steps is not None and config.steps < 1) or config.epochs <= 0:
        raise ConfigError("--steps must be 1 or more and --epochs above 0.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: give a folder as --output_dir.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / SETTINGS).exists():
        raise RunError(f"{folder} holds files that are no cagsr sft: choose an empty or new folder.")
    if not config.resume and not config.overwrite:
        raise RunError(
            f"{folder} holds another sft: go on with it (--resume), replace it (--overwrite) or choose another folder."
        )
    if config.resume and (folder / "config.json").exists():
        raise RunError(f"{folder} holds a finished sft: there is nothing to resume; start anew with --overwrite.")


def _load(config: SftConfig) -> LoadedModel:
    """Load the model, or make one with random weights."""
    if config.from_scratch:
        with _random_weights(config.model, config.seed) as path:
            try:
                loaded = load_model(replace(config.model, path=path), config.lora)
            except ModelError as error:
                raise ModelError(str(error).replace(path, config.model.path)) from error
        loaded = replace(loaded, notes=(*loaded.notes, f"Random weights from seed {config.seed} (--from_scratch)."))
    else:
        loaded = load_model(config.model, config.lora)
    if loaded.encoder_decoder:
        raise ModelError(
            f"--model {config.model.path} is an encoder-decoder model, and sft (TRL) trains decoder-only ones; fine-tune "
            "it with transformers' Seq2SeqTrainer, then go on with cagsr train."
        )
    if loaded.tokenizer.eos_token_id is None:
        raise ModelError(f"--model {config.model.path}: the tokenizer names no EOS token, so no answer could ever end.")
    return loaded


@contextmanager
def _random_weights(config: ModelConfig, seed: int) -> Iterator[str]:
    """Yield a temporary folder with a random model of ``config``'s architecture and its tokenizer."""
    try:
        model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"--model {config.path}: --from_scratch needs a config.json and a tokenizer there ({reason})"
        ) from error
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM
    if model_config.is_encoder_decoder:
        raise ModelError(f"--model {config.path} is an encoder-decoder model, and sft (TRL) trains decoder-only ones.")
    model = auto.from_config(model_config, trust_remote_code=config.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="cagsr-scratch-") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        yield path


def _length_limit(config: SftConfig, loaded: LoadedModel) -> int | None:
    context = loaded.context_length()
    if config.max_length is not None and context is not None and config.max_length > context:
        raise ConfigError(f"--max_length {config.max_length}: the model's context is only {context} tokens.")
    return config.max_length if config.max_length is not None else context


def _open(folder: Path, config: SftConfig) -> str | None:
    """Make or clear the output folder; give the checkpoint to go on from."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            # The config goes first: without it the folder is no model any more, whatever happens next.
            for name in ("config.json", *(file.name for file in folder.glob("*.safetensors"))):
                (folder / name).unlink(missing_ok=True)
        checkpoint = None
        if config.resume and (folder / CHECKPOINTS).is_dir():
            checkpoint = get_last_checkpoint(str(folder / CHECKPOINTS))
        write_text_atomically(folder / SETTINGS, to_yaml(config))
    return checkpoint


def _arguments(config: SftConfig, loaded: LoadedModel, folder: Path, limit: int | None) -> SFTConfig:
    micro = config.micro_batch_size or config.batch_size
    saving: dict[str, Any] = {"save_strategy": "no"}
    if config.save_every > 0:
        saving = {"save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": 1}
    with warnings.catch_warnings():
        # TRL's own default uses a name that transformers has renamed; the new one is unknown to older versions.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*checkpointing.*")
        return SFTConfig(
            output_dir=str(folder / CHECKPOINTS),
            num_train_epochs=config.epochs,
            max_steps=config.steps if config.steps is not None else -1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            learning_rate=_learning_rate(config),
            warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps
            lr_scheduler_type=config.lr_scheduler if config.lr_scheduler != "constant" else "constant_with_warmup",
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            adam_beta2=0.98,
            max_length=limit,
            packing=False,
            completion_only_loss=True,
            dataset_kwargs={"skip_prepare_dataset": True},  # encode_pairs has done it
            bf16=loaded.compute_dtype == torch.bfloat16,
            fp16=False,
            use_cpu=loaded.device.type == "cpu",
            gradient_checkpointing=config.model.gradient_checkpointing,
            seed=config.seed,
            data_seed=config.seed,
            disable_tqdm=True,
            logging_steps=50,
            report_to="none",
            dataloader_num_workers=0,
            **saving,
        )


def _learning_rate(config: SftConfig) -> float:
    if config.learning_rate is not None:
        return config.learning_rate
    return 2e-4 if config.lora.r > 0 else 1e-3 if config.from_scratch else 2e-5


class _Progress(TrainerCallback):
    """The house's progress display, driven by transformers' Trainer."""

    def __init__(self, notes: Sequence[str]) -> None:
        self._notes = notes
        self._progress: TrainingProgress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress = TrainingProgress(
            state.max_steps, done=state.global_step, main_process=state.is_world_process_zero
        )
        for note in self._notes:
            self._progress.say(note)
        self._progress.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._progress is not None and logs and "loss" in logs:
            self._progress.step(state.global_step, {"loss": float(logs["loss"])})

    def close(self) -> None:
        """Take the bar off the terminal, also after an exception."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


def _save(folder: Path, loaded: LoadedModel, trainer: SFTTrainer, card: str) -> None:
    """Write the trained model into the output folder, ``config.json`` last, and drop the checkpoints."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        with replace_folder(folder / "adapter") as temporary:
            model.save_pretrained(temporary)
        model = model.merge_and_unload(safe_merge=True)
    model.config.use_cache = True
    with disk_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".final-") as temporary_name:
        temporary_folder = Path(temporary_name)
        model.save_pretrained(temporary_folder)
        loaded.tokenizer.save_pretrained(temporary_folder)
        (temporary_folder / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(temporary_folder.iterdir(), key=lambda file: file.name == "config.json"):
            file.chmod(0o644)
            file.replace(folder / file.name)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _card(config: SftConfig, pairs: int, steps: int, losses: Sequence[float]) -> str:
    origin = "from random weights" if config.from_scratch else f"from `{config.model.path}`"
    loss = f" The mean training loss over the last logged steps was {losses[-1]:.3f}." if losses else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [cagsr, sft, trl]
---

# {Path(config.output_dir).name}

Supervised fine-tuning {origin} with `cagsr sft` {__version__} (TRL's SFTTrainer).

- Data: {pairs:,} prompt-completion pairs from `{config.data.path}`; the loss is on the completions only.
- {steps:,} steps of {config.batch_size} pairs, peak learning rate {_learning_rate(config):g}, seed {config.seed}.{loss}
- All settings: `{SETTINGS}`.

## Limits

The model imitates its training answers, their mistakes included. It was not evaluated here: see `cagsr diagnose`.
"""
