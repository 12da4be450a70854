"""What a training reads under its paths, as hashes: a resumed one must go on with the same data and the same models.

A run that went on with other prompts would train on some that it has held out, and mix two experiments in one curve.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path

from cagsr.config import DataConfig, RewardModelConfig, TrainConfig, TrainerConfig
from cagsr.errors import RunError
from cagsr.models.files import fingerprint_model
from cagsr.prompts.load import HEAD_ROWS, load_rows
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import working

FINGERPRINT = "fingerprint.json"

Fingerprint = dict[str, str | None]
"""Setting with its value, as ``data.path prompts.jsonl`` -> hash of what lies there; None: it can't be told."""


def fingerprint_rows(data: DataConfig) -> str:
    """A hash of the rows that ``data`` gives, of a streamed set of its first ``HEAD_ROWS``.

    Rows and not files: what lies behind ``data.limit`` or in another split may change.
    """
    digest = hashlib.sha256()
    for row in islice(load_rows(data), HEAD_ROWS if data.streaming else None):
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


@working("taking fingerprints of what is read")
def fingerprint_training(config: TrainConfig | TrainerConfig) -> Fingerprint:
    """What a training reads: prompts or pairs, those to measure on, the start, reward models, associations."""
    streamed = isinstance(config, TrainConfig) and config.data.streaming
    part = f" (its first {HEAD_ROWS:,} rows; more of a stream is not compared)" if streamed else ""
    found: Fingerprint = {
        f"data.path {config.data.path}{part}": fingerprint_rows(config.data),
        f"model.path {config.model.path}": fingerprint_model(config.model.path),
    }
    if isinstance(config, RewardModelConfig) and (path := config.eval_data) is not None:
        found[f"eval_data {path}"] = fingerprint_rows(dataclasses.replace(config.data, path=path))
    if not isinstance(config, TrainConfig):
        return found
    if (path := config.evaluation.path) is not None:
        held_out = dataclasses.replace(config.data, path=path, limit=config.evaluation.held_out, streaming=False)
        found[f"evaluation.path {path}"] = fingerprint_rows(held_out)
    folders = {
        "conversation.user": config.conversation.user,
        "curriculum.embedding_model": config.curriculum.embedding_model,
        "lora.start": config.lora.start,
    }
    for name, folder in folders.items():
        if folder is not None and Path(folder).expanduser().is_dir():
            found[f"{name} {folder}"] = fingerprint_path(folder)
    found |= {f"reward.models {model}": fingerprint_model(model) for model in config.reward.models}
    if (path := config.reward.associations.path) is not None:
        found[f"reward.associations.path {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


@working("taking fingerprints of what is read")
def fingerprint_path(path: str) -> str | None:
    """A hash of what lies at a path: a file, a model's folder, a folder of files; None where nothing does (a Hub id)."""
    place = Path(path).expanduser()
    if (place / "config.json").is_file():
        return fingerprint_model(str(place))
    if not place.is_dir():
        return _of_file(place, place.stat().st_mtime_ns, place.stat().st_size) if place.is_file() else None
    files = sorted(file for file in place.rglob("*") if file.is_file())
    hashes = [_of_file(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    lines = [f"{file}\0{found}\n" for file, found in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _of_file(path: Path, modified: int, size: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_fingerprint(folder: Path, found: Mapping[str, str | None]) -> None:
    """Keep a fingerprint in a folder."""
    write_text_atomically(folder / FINGERPRINT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def check_fingerprint(folder: Path, found: Mapping[str, str | None], what: str) -> list[str]:
    """Compare what is read now with what a stopped training has read; gives sentences about what can't be compared.

    RunError where something has changed; ``what`` can't be resumed opens the message.
    """
    try:
        before = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        return ["Whether data and models are those it began with can't be told: it was begun by an older version."]
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder / FINGERPRINT} can't be read ({error}): delete it to go on without a check."
        ) from error
    changed = [name for name, value in found.items() if None not in (value, before.get(name)) and before[name] != value]
    if changed:
        raise RunError(
            f"{what} can't be resumed because other contents than when it began lie at {', '.join(changed)}; put the old ones "
            "back, start anew or choose another folder."
        )
    unknown = [name for name, value in found.items() if value is None or before.get(name) is None]
    return [f"Whether {name} is what it was when the run began can't be told." for name in unknown]
