"""The output folder of a training on one of TRL's trainers: whose it is, its settings, its checkpoints, its model."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from cagsr.config import TrainerConfig, validate
from cagsr.errors import RunError
from cagsr.parse import to_yaml
from cagsr.runs.fingerprint import check_fingerprint, fingerprint_training, write_fingerprint
from cagsr.runs.folder import check_settings
from cagsr.runs.saved import DIFFERS, Saved
from cagsr.support.atomic import delete, disk_errors, write_text_atomically
from cagsr.support.progress import working

CHECKPOINTS = "checkpoints"


def check_trainer_config(config: TrainerConfig, command: str) -> None:
    """Refuse settings that contradict each other and folders that hold something else, before anything is loaded.

    ``command`` (as ``sft``) is the only one whose folders may be used.
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
        check_settings(folder / settings_file(command), to_yaml(config), command, type(config))


def settings_file(command: str) -> str:
    """Name of the file that holds a folder's settings and says which command made it."""
    return f"{command}.yaml"


def open_trainer_folder(config: TrainerConfig, command: str, notes: list[str]) -> str | None:
    """Make or clear the output folder and write the settings into it; give the checkpoint to go on from.

    What can't be compared on a resume is added to ``notes``; RunError where what the training reads has changed.
    """
    folder = Path(config.output_dir)
    keeps = config.save_every > 0
    found = fingerprint_training(config) if keeps or config.resume else None
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            for name in (CHECKPOINTS, "adapter", DIFFERS):
                delete(folder / name)
            # The config goes first: without it the folder is no model any more, whatever happens next.
            for name in ("config.json", "metrics.json", *(file.name for file in folder.glob("*.safetensors"))):
                (folder / name).unlink(missing_ok=True)
        checkpoint = _last_checkpoint(folder / CHECKPOINTS) if config.resume else None
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
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and "global_step" in state:
            return str(path)
    return None


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
