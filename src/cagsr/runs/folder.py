"""The run folder: what a run writes (docs/commands.md tells of each file), who may write it, how it goes on after a stop."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

import yaml

from cagsr.config import DataConfig, ModelConfig, TrainConfig
from cagsr.errors import ConfigError, RunError
from cagsr.parse import to_yaml
from cagsr.runs.fingerprint import FINGERPRINT, check_fingerprint, write_fingerprint
from cagsr.runs.lines import append_lines, truncate_lines
from cagsr.support.atomic import clean_leftovers, disk_errors, remove_folder, sync, write_text_atomically

CONFIG = "config.yaml"
BEFORE = {"reward.echo.weight": 0.0}
"""Settings whose default is not what versions without them did, and what that was."""
LOCK = "run.lock"
ASSOCIATIONS = "associations.json"
PROBE = "grounding_probe.json"
FREQUENCY = "frequency.json"
SCALES = "scales.json"
REPORT = "report.html"
PROFILE = "profile.md"
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "warnings.jsonl", "held_out.jsonl")
RUN_FILES = (CONFIG, *LOGS, "curves.png", FREQUENCY, SCALES, PROFILE, ASSOCIATIONS, PROBE, REPORT, FINGERPRINT)
RUN_FOLDERS = ("checkpoints", "best", "final", "final-adapter", "final-differs", "trackers", "rollout-weights")

MAY_DIFFER: dict[str, list[str]] = yaml.safe_load((files("cagsr.runs") / "may_differ.yaml").read_text(encoding="utf-8"))


def flat_tree(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key``."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flat_tree(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differing_keys(old_yaml: str, new_yaml: str, kind: Any = TrainConfig) -> list[str]:
    """Dotted keys whose values differ between two configs of a ``kind``, leaving out those that may (may_differ.yaml); sorted.

    A setting that the old one lacks, because it was written by an older version, is taken as :func:`lacking` says, else at its
    default.
    """
    old, new = flat_tree(yaml.safe_load(old_yaml)), flat_tree(yaml.safe_load(new_yaml))
    absent = object()
    defaults = flat_tree(yaml.safe_load(to_yaml(kind(ModelConfig(""), DataConfig(""), output_dir=""))))
    old = {key: value for key, value in (defaults | lacking(old)).items() if key in new} | old
    may_differ = MAY_DIFFER["run" if kind is TrainConfig else "trainer"]
    return sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key, absent) != new.get(key, absent)
        and not any(key == allowed or key.startswith(allowed + ".") for allowed in may_differ)
    )


def lacking(old: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was trained with whose settings (dotted keys) are older than a setting that changes it by default."""
    return {key: value for key, value in BEFORE.items() if key not in old}


def check_settings(stored: Path, config_yaml: str, what: str, kind: Any = TrainConfig) -> None:
    """Refuse to go on under other settings than ``stored`` holds: the second half would be another training than the first.

    ``what`` (``run``, or the command) can't be resumed opens the message; the rest as ``differing_keys``.
    """
    try:
        different = differing_keys(stored.read_text(encoding="utf-8"), config_yaml, kind)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        instead = " or choose another folder" if what == "run" else ", or start anew with --overwrite"
        raise RunError(f"{stored} can't be read, so the {what} can't be resumed: mend it{instead}.") from error
    if different:
        anew = "" if what == "run" else ", start anew (--overwrite)"
        raise RunError(
            f"The {what} in {stored.parent} can't be resumed because it was started with other values of "
            f"{', '.join(different)}: give the same ones{anew} or choose another folder."
        )


@dataclass
class RunFolder(AbstractContextManager["RunFolder"]):
    """A run's folder, locked against other processes. Only the main process opens it; others need no folder."""

    path: Path
    checkpoint: Path | None
    """The checkpoint to go on from, after ``step`` steps; None: start from the beginning."""
    step: int
    notes: tuple[str, ...]
    """What the user should know about how the folder was opened, in sentences."""
    _lock: TextIO = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        config_yaml: str,
        *,
        resume: bool,
        overwrite: bool,
        fingerprint: Mapping[str, str | None] | None = None,
    ) -> RunFolder:
        """Make, resume or overwrite a run folder, lock it and store the config.

        On ``resume`` the newest valid checkpoint is looked up and the logs are cut back to its step. Call it once
        model and data are loaded: ``overwrite`` deletes the old run here. ``fingerprint``, what the run reads
        (``cagsr.runs.fingerprint``), is kept, and on ``resume`` compared first.

        Raises:
            ConfigError: both ``resume`` and ``overwrite``.
            RunError: the folder holds another run and neither flag is set; it holds files that are no run; it is in
                use; the config differs in something that matters, or what the run reads has changed; it can't be written.
        """
        path = Path(path)
        if resume and overwrite:
            raise ConfigError("--run.resume True and --run.overwrite True exclude each other: give one of them.")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file: give a folder as output_dir.")
        with disk_errors(path):
            holds_files = path.is_dir() and any(path.iterdir())
            is_run = (path / LOCK).exists() or ((path / CONFIG).exists() and (path / LOGS[0]).exists())
            if holds_files and not is_run:
                raise RunError(f"{path} holds files that are not a cagsr run: choose an empty or new folder.")
            path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
        try:
            # A lock alone is no run: the process that made it ended before it wrote anything.
            holds_run = any((path / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS))
            if holds_run and not resume and not overwrite:
                raise RunError(
                    f"{path} holds another run: go on with it (--run.resume True), replace it "
                    "(--run.overwrite True) or choose another folder."
                )
            clean_leftovers(path)
            for name in ("checkpoints", "best"):
                if (path / name).is_dir():
                    clean_leftovers(path / name)
            checkpoint: Path | None = None
            step, notes = 0, list[str]()
            if overwrite:
                _remove_run(path)
            elif resume:
                checkpoint, step, notes = _resume(path, config_yaml, fingerprint)
            write_text_atomically(path / CONFIG, config_yaml)
            if fingerprint is not None:
                write_fingerprint(path, fingerprint)
            for name in LOGS:
                append_lines(path / name, [])
        except BaseException:
            lock.close()
            raise
        return cls(path, checkpoint, step, tuple(notes), lock)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """File of the metrics."""
        return self.path / LOGS[0]

    def append(self, log: str, step: int, *rows: Mapping[str, Any]) -> None:
        """Add one line for each row to a log (``metrics``, ``samples`` ...). Into ``metrics`` goes nothing read from a clock."""
        append_lines(self.path / f"{log}.jsonl", [{"step": step, **row} for row in rows])

    def sync_logs(self) -> None:
        """Bring the logs to the disk before a checkpoint is saved: none may lag behind it."""
        with disk_errors(self.path):
            for name in LOGS:
                sync(self.path / name)

    def close(self) -> None:
        """Release the lock; the folder may then be opened again."""
        self._lock.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_being_written(path: Path) -> bool:
    """Whether a process holds the run folder's lock at this moment. Changes nothing in the folder."""
    try:
        with open(path / LOCK, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise RunError(f"{path / LOCK} can't be read ({error.strerror}): make it readable.") from error
    return False


def lock_folder(path: Path) -> TextIO:
    """Lock a folder for this process; the kernel drops the lock when the process ends, however it ends."""
    with disk_errors(path / LOCK):
        stream = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (stays open as long as the run)
        for _ in range(5):  # a page of the run (``is_being_written``) may be looking just now
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        else:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise RunError(
                f"{path} is being written by another process (number {owner}): wait for it or choose another folder."
            )
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
    return stream


def _remove_run(path: Path) -> None:
    """Delete the files of a run, the logs last: after a kill in the middle the folder still says that it holds a run."""
    with disk_errors(path):
        for name in RUN_FOLDERS:
            if (path / name).is_dir() or (path / name).is_symlink():
                remove_folder(path / name)
        for name in reversed(RUN_FILES):
            (path / name).unlink(missing_ok=True)


def _resume(
    path: Path, config_yaml: str, fingerprint: Mapping[str, str | None] | None
) -> tuple[Path | None, int, list[str]]:
    """Where to go on from: the checkpoint, its step, notes. Cuts the logs back to it."""
    # Who only reads a folder (cagsr report) does not wait for torch.
    from cagsr.runs.checkpoint import latest_checkpoint

    config, latest = path / CONFIG, latest_checkpoint(path / "checkpoints")
    if not config.exists() and latest.path is not None:
        raise RunError(f"{config} is missing, so the run can't be resumed: put it back or choose another folder.")
    if not config.exists():
        return None, 0, [f"There is no run in {path} to resume: starting from the beginning."]
    check_settings(config, config_yaml, "run")
    notes = list(latest.notes)
    if fingerprint is not None:
        notes += check_fingerprint(path, fingerprint, f"The run in {path}")
    before, after = (flat_tree(yaml.safe_load(text)) for text in (config.read_text(encoding="utf-8"), config_yaml))
    was, now = before.get("run.steps"), after.get("run.steps")
    if after.get("ppo.lr_scheduler", "constant") != "constant" and was != now:
        notes.append(f"run.steps was {was} and is {now}: the learning rate decays towards the new end from here.")
    if latest.path is None:
        notes.append(f"The run in {path} has no checkpoint yet: starting from the beginning.")
    else:
        notes.append(f"Going on from {latest.path}, step {latest.step}.")
    # Before the first step nothing is kept, not even what was logged as step 0.
    cut = latest.step if latest.path is not None else -1
    for name in LOGS:
        truncate_lines(path / name, cut)
    return latest.path, latest.step, notes
