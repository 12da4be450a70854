"""What every command on one of TRL's trainers shares: its output folder, its arguments, its progress, its last save."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cagsr.config import LoraConfig, TrainerConfig, validate
from cagsr.configfile import to_yaml
from cagsr.errors import ConfigError, RunError
from cagsr.models.generation import ending_as
from cagsr.models.load import LoadedModel
from cagsr.runs.fingerprint import check_fingerprint, fingerprint_trainer, write_fingerprint
from cagsr.runs.folder import differing_keys, flat_defaults
from cagsr.runs.numbers import StepNumbers
from cagsr.runs.saved import DIFFERS, Probe, Saved, chosen_dtype, save_adapter_compared, save_compared
from cagsr.support.atomic import delete, disk_errors, replace_folder, write_text_atomically
from cagsr.support.progress import Task, now, say, shown, working

CHECKPOINTS = "checkpoints"
RECENT = 50
"""Steps over which what a training logs is averaged."""

MAY_DIFFER = (
    "output_dir",
    "epochs",
    "steps",
    "micro_batch_size",
    "save_every",
    "save_dtype",
    "resume",
    "overwrite",
    "model.device",
    "model.gradient_checkpointing",
)
"""Settings that may change when a training is resumed, as those of a run may: length, bookkeeping, where it runs."""


def check_trainer_config(config: TrainerConfig, command: str) -> None:
    """Refuse settings that contradict each other and folders that hold something else, before anything is loaded.

    Raises:
        ConfigError: settings that exclude each other or are out of range.
        RunError: the output folder can't be used; ``command`` (as ``sft``) is the only one whose folders may be.
    """
    validate(config)
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: give a folder as --output_dir.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / settings_file(command)).exists():
        raise RunError(f"{folder} holds files that are no cagsr {command}: choose an empty or new folder.")
    if not config.resume and not config.overwrite:
        raise RunError(
            f"{folder} holds another {command}: go on with it (--resume), replace it (--overwrite) or choose another "
            "folder."
        )
    if config.resume and (folder / "config.json").exists():
        raise RunError(f"{folder} holds a finished {command}: there is nothing to resume; start anew with --overwrite.")
    if config.resume:
        _check_resumed(config, folder / settings_file(command), command)


def _check_resumed(config: TrainerConfig, stored: Path, command: str) -> None:
    """Refuse to go on under other settings: the second half would be another training than the first."""
    try:
        different = differing_keys(
            stored.read_text(encoding="utf-8"), to_yaml(config), MAY_DIFFER, flat_defaults(type(config))
        )
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(
            f"{stored} can't be read, so the {command} can't be resumed: mend it, or start anew with --overwrite."
        ) from error
    if different:
        raise RunError(
            f"The {command} in {stored.parent} can't be resumed because it was started with other values of "
            f"{', '.join(different)}: give the same ones, start anew (--overwrite) or choose another folder."
        )


def settings_file(command: str) -> str:
    """Name of the file that holds a folder's settings and says which command made it."""
    return f"{command}.yaml"


def open_trainer_folder(config: TrainerConfig, command: str, notes: list[str]) -> str | None:
    """Make or clear the output folder and write the settings into it; give the checkpoint to go on from.

    Args:
        config: the settings.
        command: as ``sft``.
        notes: what can't be compared on a resume is added to it.

    Raises:
        RunError: what the training reads has changed since it began; the folder can't be written.
    """
    folder = Path(config.output_dir)
    keeps = config.save_every > 0
    found = fingerprint_trainer(config) if keeps or config.resume else None
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            delete(folder / CHECKPOINTS)
            delete(folder / "adapter")
            delete(folder / DIFFERS)
            # The config goes first: without it the folder is no model any more, whatever happens next.
            for name in ("config.json", "metrics.json", *(file.name for file in folder.glob("*.safetensors"))):
                (folder / name).unlink(missing_ok=True)
        checkpoint = None
        if config.resume and (folder / CHECKPOINTS).is_dir():
            checkpoint = _last_checkpoint(folder / CHECKPOINTS)
        if found is not None and checkpoint is not None:
            notes += check_fingerprint(folder / CHECKPOINTS, found, f"The {command} in {folder}")
        # The settings go first: they say whose folder it is.
        write_text_atomically(folder / settings_file(command), to_yaml(config))
        if found is not None and keeps:
            # Beside the checkpoints: what it is there for goes when they go.
            (folder / CHECKPOINTS).mkdir(exist_ok=True)
            write_fingerprint(folder / CHECKPOINTS, found)
    return checkpoint


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; None where there is none.

    transformers writes a checkpoint file by file, ``trainer_state.json`` last: one that a kill cut short has none, or half
    of it.
    """
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir()]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and "global_step" in state:
            return str(path)
    return None


def length_limit(config: TrainerConfig, loaded: LoadedModel) -> int | None:
    """The longest text in tokens: ``--max_length``, else the model's context; None where neither states one.

    Raises:
        ConfigError: ``--max_length`` is longer than the context.
    """
    context = loaded.context_length()
    if config.max_length is not None and context is not None and config.max_length > context:
        raise ConfigError(f"--max_length {config.max_length}: the model's context is only {context} tokens.")
    return config.max_length if config.max_length is not None else context


def trainer_arguments(config: TrainerConfig, loaded: LoadedModel, learning_rate: float) -> dict[str, Any]:
    """The arguments that transformers' Trainer takes from our settings, whatever is trained."""
    micro = config.micro_batch_size or config.batch_size
    saving: dict[str, Any] = {"save_strategy": "no"}
    if config.save_every > 0:
        saving = {"save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": 1}
    return {
        "output_dir": str(Path(config.output_dir) / CHECKPOINTS),
        "num_train_epochs": config.epochs,
        "max_steps": config.steps if config.steps is not None else -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_size // micro,
        "learning_rate": learning_rate,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a share of the steps
        "lr_scheduler_type": config.lr_scheduler if config.lr_scheduler != "constant" else "constant_with_warmup",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta2": 0.98,
        "bf16": loaded.compute_dtype == torch.bfloat16,
        "fp16": False,
        "use_cpu": loaded.device.type == "cpu",
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "seed": config.seed,
        "data_seed": config.seed,
        "disable_tqdm": True,
        "logging_steps": 1,  # TRL brings its numbers together at every step anyway
        "report_to": "none",
        "dataloader_num_workers": 0,
        **saving,
    }


def run_trainer(trainer: Any, folder: Path, checkpoint: str | None, notes: Sequence[str], *, quiet: bool) -> None:
    """Train with the house's progress in place of transformers' own; ``notes`` are said first, unless ``quiet``.

    Raises:
        RunError: the disk is full or the folder can't be written.
    """
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


def mean_of(trainer: Any, name: str, *, first: bool = False) -> float | None:
    """Mean of what was logged under ``name`` in the last (or the first) steps, at most ``RECENT``; None: never logged.

    Of a short training it is half of the steps, so that the first and the last are two things.
    """
    found = [float(entry[name]) for entry in trainer.state.log_history if name in entry]
    count = min(RECENT, max(1, len(found) // 2))
    some = found[:count] if first else found[-count:]
    return sum(some) / len(some) if some else None


def say_done(trainer: Any, folder: Path, *measures: str) -> None:
    """Say where the model is and how the training went, on standard output: its loss, and ``measures`` beside it."""
    steps, loss = trainer.state.global_step, mean_of(trainer, "loss")
    told = [f"{steps:,} {'step' if steps == 1 else 'steps'}"]
    if loss is not None:
        told.append(f"training loss {mean_of(trainer, 'loss', first=True):.3f} at first, {loss:.3f} at last")
    print(f"Done: the model is in {folder}. {', '.join((*told, *measures))}.", flush=True)


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


def check_adapted_head(loaded: LoadedModel, lora: LoraConfig, command: str) -> None:
    """Refuse adapters on the output head: TRL reads its weight directly, so that they would never be trained.

    Raises:
        ConfigError: naming the setting.
    """
    if loaded.lora and isinstance(loaded.model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"--lora.target_modules {lora.target_modules}: {command} (TRL) can't train an adapter on the output head (lm_head); "
            "leave it out."
        )


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

    With LoRA the adapter goes to ``adapter/``, and the model has it merged. Only the main process calls it.

    Args:
        trainer: done.
        config: the command's settings.
        loaded: how the starting model was loaded.
        probe: the texts that the comparison runs on.
        texts: makes further text files, by name, from what was saved.
        adapter: False: the adapter alone is of no use, its base being kept nowhere.

    Raises:
        RunError: the disk is full, or what was saved is not what was trained; the checkpoints then stay.
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
            with replace_folder(folder / "adapter") as temporary:
                save_adapter_compared(temporary, model, loaded, probe, place=folder / "adapter", kept=kept)

    def fill(temporary: Path) -> Saved:
        dtype = chosen_dtype(config.save_dtype, loaded)
        saved = save_compared(temporary, model, loaded, probe, dtype, ending_as(loaded), place=folder, kept=kept)
        for name, text in texts(saved).items():
            (temporary / name).write_text(text, encoding="utf-8")
        return saved

    saved = write_model(folder, fill)
    drop_checkpoints(folder)
    return saved


@working("saving the model")
def write_model(folder: Path, fill: Callable[[Path], Saved]) -> Saved:
    """Put what ``fill`` writes into an empty folder into ``folder``, ``config.json`` last; nothing where it fails."""
    with disk_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".final-") as temporary_name:
        temporary = Path(temporary_name)
        saved = fill(temporary)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            if file.is_dir():  # further chat templates; a folder can't be renamed over another one
                delete(folder / file.name)
            else:
                file.chmod(0o644)
            file.replace(folder / file.name)
    return saved


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished training."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
