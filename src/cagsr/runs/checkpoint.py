"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint folder ``step-000020`` holds one safetensors file per module, a JSON (and safetensors) file per optimizer
and for the extra state, one RNG state per process, and ``manifest.json`` with the size and SHA-256 of each. The
folder is written under a temporary name and renamed, so one that a kill cut short is never taken for a checkpoint;
one that was damaged later is found by its manifest and skipped. Nothing is pickled: that would run code from the file when
it is loaded.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from cagsr.errors import RunError
from cagsr.models.sharding import divided_like, divided_optimizer_state, full_optimizer_state, full_state
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
    """The rest as plain data (numbers, text, tensors, containers). Not restored in place: ``load_checkpoint`` returns it."""
    trainable_only: bool = False
    """Save only parameters that need gradients (LoRA adapters)."""


class Loaded(NamedTuple):
    """What ``load_checkpoint`` hands back besides what it restored in place."""

    step: int
    extra: Mapping[str, Any]
    notes: tuple[str, ...]
    """What could not be restored exactly, in sentences for the user."""


class Latest(NamedTuple):
    """The newest valid checkpoint of a run (path None and step 0 where it has none), and notes on broken ones skipped."""

    path: Path | None
    step: int
    notes: tuple[str, ...]


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoint_steps(folder: Path) -> list[tuple[int, Path]]:
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
    *,
    write: bool = True,
) -> Path:
    """Write ``folder/step-…`` and then delete the oldest intact checkpoints beyond ``keep`` (at least 1).

    Every process calls it, for sharded tensors are put together; all but the main one with ``write`` False. ``rng`` is the
    state of every process (``rng_state``) in the order of their ranks; None: this process's.

    Raises:
        RunError: the disk is full or the folder can't be written; earlier checkpoints are untouched.
        TypeError: ``state.extra`` holds something that is not plain data.
    """
    target, ranks = folder / f"step-{step:06d}", rng or [rng_state()]
    weights = {
        name: full_state(module, keep=write, names=_stored_names(module) if state.trainable_only else None)
        for name, module in state.modules.items()
    }
    optimizers = {name: full_optimizer_state(optimizer, keep=write) for name, optimizer in state.optimizers.items()}
    if not write:
        return target
    with replace_folder(target) as temporary:
        for name, tensors in weights.items():
            _save_weights(tensors, temporary / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            save_tree(optimizer, temporary / f"optimizer-{name}")
        save_tree(dict(state.extra), temporary / "extra")
        for rank, one in enumerate(ranks):
            save_tree(dict(one), temporary / f"rng-rank{rank}")
        files = {one.name: {"size": one.stat().st_size, "sha256": _sha256(one)} for one in sorted(temporary.iterdir())}
        manifest = {"format": "cagsr-checkpoint", "version": VERSION, "step": step, "processes": len(ranks)}
        manifest |= {"trainable_only": state.trainable_only, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    intact = 0
    for number, path in checkpoint_steps(folder):
        if number <= step and intact >= keep:
            remove_folder(path)
        elif number <= step and checkpoint_problem(path, thorough=False) is None:
            intact += 1
    return target


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
    """Find the newest valid checkpoint in a run's ``checkpoints`` folder. It only reads: the run may be going on."""
    notes: list[str] = []
    for step, path in checkpoint_steps(folder):
        problem = checkpoint_problem(path)
        if problem is None:
            return Latest(path, step, tuple(notes))
        notes.append(f"The checkpoint {path} is skipped because {problem}.")
    return Latest(None, 0, tuple(notes))


def load_checkpoint(path: Path, state: CheckpointState, rank: int = 0, processes: int = 1, *, seed: int = 0) -> Loaded:
    """Restore modules, optimizers and this process's RNG in place, and return the rest.

    Every process calls it. The random state is set last, so that nothing done here moves it. A checkpoint of another number
    of processes holds everything but their random states: these start anew, from the run's ``seed``, and a note says so.

    Raises:
        RunError: the checkpoint is broken or doesn't fit the objects.
    """
    problem = checkpoint_problem(path, thorough=False)
    if problem is not None:
        raise RunError(f"The checkpoint {path} can't be used because {problem}: resume from an earlier one.")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["trainable_only"] != state.trainable_only:
        raise RunError(f"The checkpoint {path} was written with the other setting of lora.r: resume with the same.")
    wanted = [f"{name}.safetensors" for name in state.modules]
    wanted += [f"optimizer-{name}.json" for name in state.optimizers]
    absent = [name for name in wanted if name not in manifest["files"]]
    as_started = "resume with the settings the run was started with."
    if absent:
        raise RunError(f"The checkpoint {path} holds no {absent[0]}: {as_started}")
    for name, module in state.modules.items():
        _load_weights(module, path / f"{name}.safetensors", trainable_only=state.trainable_only)
    for name, optimizer in state.optimizers.items():
        try:
            stored = load_tree(path / f"optimizer-{name}")
            optimizer.load_state_dict(divided_optimizer_state(stored, optimizer))
        except ValueError as error:
            raise RunError(f"The checkpoint {path} doesn't fit the optimizer {name} ({error}): {as_started}") from error
    extra = load_tree(path / "extra")
    if manifest["processes"] == processes:
        notes = _set_rng_state(load_tree(path / f"rng-rank{rank}"))
    else:
        text = f"{seed}/{manifest['step']}/{rank}/{processes}"
        set_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))
        notes = [
            f"The checkpoint was written with {manifest['processes']} process(es) and there are {processes}: the prompts go on "
            "where they were, and random numbers start anew from seed, step and process."
        ]
    return Loaded(manifest["step"], extra, tuple(notes))


def rng_state() -> dict[str, Any]:
    """The generators of this process (Python, NumPy's global, torch on CPU, every CUDA device, MPS) as numbers and CPU tensors."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> list[str]:
    """Put the generators of this process where ``rng_state`` found them; notes tell of devices where that can't be done."""
    notes = []
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    saved_cuda, here = state.get("cuda", []), torch.cuda.device_count()
    if len(saved_cuda) != here:
        notes.append(
            f"The checkpoint was written with {len(saved_cuda)} CUDA devices and there are {here} here: "
            "their random numbers start anew, so the run goes on but not bit for bit."
        )
    elif saved_cuda:
        torch.cuda.set_rng_state_all(saved_cuda)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    elif "mps" in state or torch.backends.mps.is_available():
        notes.append("The random numbers of MPS can't be restored here, so the run goes on but not bit for bit.")
    return notes


_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_PAIRS = "__pairs__"
_MARKS = (_TENSOR, _TUPLE, _PAIRS)


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors takes them, contiguous and each alone in its storage: copied only where they are not."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        as_it_is = alone and tensor.is_contiguous() and tensor.data_ptr() not in seen
        storable[name] = tensor.detach() if as_it_is else tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
    save_file(storable, path, metadata)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Empty and meta tensors all have address 0 and are no aliases of each other.
    if tensor.data_ptr() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _stored_names(module: nn.Module) -> set[str]:
    """Names of the parameters that need gradients, tied ones with all their names."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a module's whole weights by name as safetensors; tensors with several names (tied weights) are stored once."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        first = seen.setdefault(_identity(tensor), name)
        if first == name:
            kept[name] = tensor
        else:
            aliases[name] = first
    _write(kept, path, {"format": "pt", "aliases": json.dumps(aliases)})


def _load_weights(module: nn.Module, path: Path, *, trainable_only: bool) -> None:
    """Load what ``_save_weights`` wrote into a module in place. RunError: it has other parameters or shapes than the file."""
    with safe_open(path, framework="pt") as file:
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    weights = load_file(path)
    weights.update({alias: weights[first] for alias, first in aliases.items()})
    here = module.state_dict()
    weights = {name: divided_like(tensor, here[name]) if name in here else tensor for name, tensor in weights.items()}
    try:
        missing, unexpected = module.load_state_dict(weights, strict=not trainable_only)
    except RuntimeError as error:
        raise RunError(
            f"{path} doesn't fit the model ({str(error).splitlines()[-1].strip()}): resume with the model the run was "
            "started with."
        ) from error
    wrong = sorted(_stored_names(module).intersection(missing)) + sorted(unexpected)
    if trainable_only and wrong:
        raise RunError(
            f"{path} doesn't fit the model's trainable parameters (first: {wrong[0]}): resume with the LoRA settings "
            "the run was started with."
        )


def save_tree(tree: Any, path: Path) -> None:
    """Write nested state as ``path`` + ``.json`` and, where it holds tensors, ``path`` + ``.safetensors``."""
    value, tensors = pack_tree(tree)
    path.with_name(path.name + ".json").write_text(json.dumps(value), encoding="utf-8")
    if tensors:
        _write(tensors, path.with_name(path.name + ".safetensors"))


def load_tree(path: Path) -> Any:
    """Read what ``save_tree`` wrote; tensors come on the CPU."""
    value = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    tensors_file = path.with_name(path.name + ".safetensors")
    return unpack_tree(value, load_file(tensors_file) if tensors_file.exists() else {})


def pack_tree(tree: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists and tuples into a JSON value and its tensors by name, ``{"__tensor__": name}`` in their place.

    Floats, integers, strings, booleans and None are kept exactly (JSON writes the shortest text that reads back as
    the same float; NaN and infinities as Python's ``json`` does), tuples stay tuples and integer keys integers; TypeError for
    anything else. The tensors' names begin with ``name``, as in ``state.0.exp_avg``.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any, at: str) -> Any:
        # bool is an int; NumPy's float64 is a float but its float32 is not, so it ends in the TypeError below.
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            while at in tensors:  # {"a": {"b": x}, "a.b": y} would give both tensors one name
                at += "'"
            tensors[at] = value
            return {_TENSOR: at}
        if isinstance(value, tuple):
            return {_TUPLE: [pack(item, f"{at}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [pack(item, f"{at}.{i}") for i, item in enumerate(value)]
        if isinstance(value, dict):
            plain = all(isinstance(key, str) and key not in _MARKS for key in value)
            packed = [(key, pack(item, f"{at}.{key}")) for key, item in value.items()]
            return dict(packed) if plain else {_PAIRS: [[key, item] for key, item in packed]}
        raise TypeError(f"{at} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text and containers.")

    return pack(tree, name), tensors


def unpack_tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo ``pack_tree``."""
    if isinstance(value, list):
        return [unpack_tree(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(unpack_tree(item, tensors) for item in value[_TUPLE])
        if _PAIRS in value:
            return {key: unpack_tree(item, tensors) for key, item in value[_PAIRS]}
        return {key: unpack_tree(item, tensors) for key, item in value.items()}
    return value
