"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint folder ``step-000020`` holds one safetensors file per module, a JSON (and safetensors) file per optimizer
and for the extra state, one RNG state per process, and ``manifest.json`` with the size and SHA-256 of each. The
folder is written under a temporary name and renamed, so one that a kill cut short is never taken for a checkpoint;
one that was damaged later is found by its manifest and skipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cagsr.errors import ConfigError, RunError
from cagsr.models.sharding import divided_optimizer_state, full_optimizer_state, full_state
from cagsr.runs.rng import reseed, rng_state, set_rng_state
from cagsr.runs.state_files import load_tree, load_weights, save_tree, save_weights, stored_names
from cagsr.support.atomic import remove_folder, replace_folder

MANIFEST = "manifest.json"
VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class CheckpointState:
    """What is saved and, by ``load_checkpoint``, restored in place. Give bare objects, unwrapped from accelerate."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """``policy``, ``value_head`` ... Tied weights are stored once."""
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    """Moments, step counts and parameter groups, exactly."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The rest as plain data (numbers, text, tensors, containers): data position, KL controller, running moments,
    monitors. Not restored in place: ``load_checkpoint`` returns it."""
    trainable_only: bool = False
    """Save only parameters that need gradients (LoRA adapters)."""


@dataclass(frozen=True)
class Collected:
    """The tensors of a ``CheckpointState``, those that are divided among processes put together."""

    weights: Mapping[str, Mapping[str, Tensor]]
    """By module, then by name."""
    optimizers: Mapping[str, Mapping[str, Any]]


def collect_state(state: CheckpointState, *, keep: bool = True) -> Collected:
    """Put together what ``save_checkpoint`` writes; every process calls it, with ``keep`` False where it only takes part."""
    return Collected(
        {
            name: full_state(module, keep=keep, names=stored_names(module) if state.trainable_only else None)
            for name, module in state.modules.items()
        },
        {name: full_optimizer_state(optimizer, keep=keep) for name, optimizer in state.optimizers.items()},
    )


@dataclass(frozen=True)
class Loaded:
    """What ``load_checkpoint`` hands back besides what it restored in place."""

    step: int
    extra: Mapping[str, Any]
    notes: tuple[str, ...]
    """What could not be restored exactly, in sentences for the user."""


@dataclass(frozen=True)
class Latest:
    """The newest valid checkpoint of a run, if it has one."""

    path: Path | None
    step: int
    """0 where there is none."""
    notes: tuple[str, ...]
    """The broken checkpoints that were skipped, in sentences for the user."""


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints in a folder, newest first, valid or not."""
    if not folder.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def save_checkpoint(
    folder: Path,
    step: int,
    state: CheckpointState,
    keep: int,
    rng: Sequence[Mapping[str, Any]] | None = None,
    collected: Collected | None = None,
) -> Path:
    """Write ``folder/step-…`` and then delete the oldest checkpoints beyond ``keep`` (at least 1). Only the main process calls it.

    Args:
        folder: the run's ``checkpoints`` folder, made where it is absent.
        step: steps done.
        state: what to save.
        keep: how many checkpoints to keep. Older ones go only after the new one is in place.
        rng: the RNG state of every process (``rng_state``), in the order of their ranks; None: this process's.
        collected: the tensors of ``state`` put together (``collect_state``, which all processes call); None: none is sharded.

    Raises:
        ConfigError: ``keep`` is below 1.
        RunError: the disk is full or the folder can't be written; earlier checkpoints are untouched.
        TypeError: ``state.extra`` holds something that is not plain data.
    """
    if keep < 1:
        raise ConfigError(f"run.save_total_limit is {keep}: keep at least 1 checkpoint.")
    ranks = [rng_state()] if rng is None else list(rng)
    tensors = collect_state(state) if collected is None else collected
    target = folder / f"step-{step:06d}"
    with replace_folder(target) as temporary:
        for name, weights in tensors.weights.items():
            save_weights(weights, temporary / f"{name}.safetensors")
        for name, optimizer in tensors.optimizers.items():
            save_tree(optimizer, temporary / f"optimizer-{name}")
        save_tree(dict(state.extra), temporary / "extra")
        for rank, one in enumerate(ranks):
            save_tree(dict(one), temporary / f"rng-rank{rank}")
        files = {one.name: {"size": one.stat().st_size, "sha256": _sha256(one)} for one in sorted(temporary.iterdir())}
        manifest = {"format": "cagsr-checkpoint", "version": VERSION, "step": step, "processes": len(ranks)}
        manifest |= {"trainable_only": state.trainable_only, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _delete_old(folder, step, keep)
    return target


def _delete_old(folder: Path, step: int, keep: int) -> None:
    """Delete the checkpoints before ``step`` beyond the newest ``keep`` intact ones (broken ones do not count)."""
    intact = 0
    for number, path in _steps(folder):
        if number > step:
            continue
        if intact >= keep:
            remove_folder(path)
        elif checkpoint_problem(path, thorough=False) is None:
            intact += 1


def checkpoint_problem(path: Path, *, thorough: bool = True) -> str | None:
    """Why a checkpoint folder is not valid, or None; ``thorough`` compares contents (SHA-256) too, not only names and sizes."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != "cagsr-checkpoint" or manifest["version"] != VERSION:
            return f"its format is {manifest['format']} {manifest['version']}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
            if thorough and _sha256(file) != expected["sha256"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it can't be read ({type(error).__name__}: {error})"
    return None


def latest_checkpoint(folder: Path) -> Latest:
    """Find the newest valid checkpoint in a run's ``checkpoints`` folder, with a note for each broken one skipped.

    It only reads, so it may be asked while the run is going on.
    """
    notes: list[str] = []
    for step, path in _steps(folder):
        problem = checkpoint_problem(path)
        if problem is None:
            return Latest(path, step, tuple(notes))
        notes.append(f"The checkpoint {path} is skipped because {problem}.")
    return Latest(None, 0, tuple(notes))


def load_checkpoint(path: Path, state: CheckpointState, rank: int = 0, processes: int = 1, *, seed: int = 0) -> Loaded:
    """Restore modules, optimizers and this process's RNG in place, and return the rest.

    Every process calls it. ``state.extra`` is not read. The random state is set last, so that nothing done here moves it. A
    checkpoint of another number of processes holds everything but their random states: these start anew, from the run's
    ``seed``, and a note says so.

    Raises:
        RunError: the checkpoint is broken or doesn't fit the objects.
    """
    problem = checkpoint_problem(path, thorough=False)
    if problem is not None:
        raise RunError(f"The checkpoint {path} can't be used because {problem}: resume from an earlier one.")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["trainable_only"] != state.trainable_only:
        raise RunError(f"The checkpoint {path} was written with the other setting of lora.r: resume with the same.")
    wanted = [
        *(f"{name}.safetensors" for name in state.modules),
        *(f"optimizer-{name}.json" for name in state.optimizers),
    ]
    absent = [name for name in wanted if name not in manifest["files"]]
    if absent:
        raise RunError(
            f"The checkpoint {path} holds no {absent[0]}: resume with the settings the run was started with."
        )
    for name, module in state.modules.items():
        load_weights(module, path / f"{name}.safetensors", trainable_only=state.trainable_only)
    for name, optimizer in state.optimizers.items():
        try:
            stored = load_tree(path / f"optimizer-{name}")
            optimizer.load_state_dict(divided_optimizer_state(stored, optimizer))
        except ValueError as error:
            raise RunError(
                f"The checkpoint {path} doesn't fit the optimizer {name} ({error}): resume with the settings the run "
                "was started with."
            ) from error
    extra = load_tree(path / "extra")
    if manifest["processes"] == processes:
        notes = set_rng_state(load_tree(path / f"rng-rank{rank}"))
    else:
        reseed(seed, manifest["step"], rank, processes)
        notes = [
            f"The checkpoint was written with {manifest['processes']} process(es) and there are {processes}: the prompts go on "
            "where they were, and random numbers start anew from seed, step and process."
        ]
    return Loaded(manifest["step"], extra, tuple(notes))
