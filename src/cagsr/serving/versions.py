"""The versions of an adapter in a folder, and which one is served: a manifest that is replaced in one rename.

Version 0 is the base model without an adapter. A version counts once the manifest names it, with the SHA-256 of each of its
files; what a kill leaves in the folder besides is never served.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cagsr.errors import RunError
from cagsr.support.atomic import clean_leftovers, disk_errors, replace_folder, write_text_atomically

FOLDER, MANIFEST, WHY = "versions", "manifest.json", "why.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
REWARD = ("config.yaml", "frequency.json", "scales.json")
"""What of a training's run folder says how its reward judges (``runs/reward.py``)."""


@dataclass(frozen=True)
class Version:
    """One version in the manifest."""

    parent: int
    """The version it was trained on from, which ``rollback`` goes back to."""
    accepted: bool
    """Whether it was put in place; one that wasn't has its numbers and no adapter."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256."""
    created: str = ""


@dataclass(frozen=True)
class Manifest:
    """Which version is served, and all there are."""

    current: int = 0
    trained: int = 0
    """Number of the newest prompt at the time of the last training."""
    versions: Mapping[int, Version] = field(default_factory=dict)

    @property
    def next(self) -> int:
        """The number of the version that is trained next."""
        return max(self.versions, default=0) + 1

    def served(self) -> list[int]:
        """The numbers that can be asked for."""
        return [0, *(number for number, one in sorted(self.versions.items()) if one.accepted)]


class Versions:
    """The folder of the versions; several processes may read and change it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._path = self.folder / MANIFEST
        self._known: tuple[tuple[int, int], Manifest] | None = None
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        """Where a version lies."""
        return self.folder / f"{number:04d}"

    def manifest(self) -> Manifest:
        """The manifest as it is now; read again only where the file is another one. RunError where it can't be read."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return Manifest()
        key = (stat.st_mtime_ns, stat.st_ino)
        if self._known is None or self._known[0] != key:
            self._known = (key, _read(self._path))
        return self._known[1]

    def check(self, number: int) -> None:
        """See that a version's files are those that were put in place; RunError where one is not."""
        for name, digest in self.manifest().versions[number].files.items():
            file = self.path(number) / name
            if not file.is_file() or _digest(file) != digest:
                raise RunError(
                    f"{file} is not the file that was put in place, so version {number} isn't served; put it back, or go back "
                    f"a version (cagsr serve rollback --folder {self.folder.parent})."
                )

    def add(self, number: int, run: Path | None, why: Mapping[str, Any], *, parent: int, trained: int) -> None:
        """Put a version in place; without a ``run`` folder it is one that was refused.

        It is served from now on, unless somebody has gone to another version than its ``parent`` meanwhile.

        The adapter and what says how its reward judges are copied and brought to the disk before the manifest names them. Nothing
        is done where the manifest names the version already.
        """
        with self._alone():
            old = self.manifest()
            if number in old.versions:
                return
            with replace_folder(self.path(number)) as folder:
                for source in [] if run is None else _sources(run):
                    shutil.copyfile(source, folder / source.name)
                (folder / WHY).write_text(json.dumps(why, indent=1, allow_nan=False) + "\n", encoding="utf-8")
                files = {file.name: _digest(file) for file in sorted(folder.iterdir())}
            made = Version(parent, run is not None, files, datetime.now(UTC).isoformat(timespec="seconds"))
            current = number if run is not None and old.current == parent else old.current
            self._write(replace(old, current=current, trained=trained, versions={**old.versions, number: made}))

    def tried(self, trained: int) -> None:
        """Note that a training up to this prompt came to nothing."""
        with self._alone():
            self._write(replace(self.manifest(), trained=trained))

    def roll_back(self) -> int:
        """Serve the version that the current one was trained on from; its number. RunError where it is the base already."""
        with self._alone():
            old = self.manifest()
            if old.current == 0:
                raise RunError(f"{self.folder}: the base model is served, and there is no version before it.")
            found = old.versions[old.current].parent
            self._write(replace(old, current=found))
            return found

    def why(self, number: int) -> dict[str, Any]:
        """The numbers that a version was judged by."""
        try:
            found: dict[str, Any] = json.loads((self.path(number) / WHY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path(number) / WHY} can't be read ({error}).") from error
        return found

    def clean(self) -> None:
        """Remove what a kill has left: folders under temporary names, and those that no manifest names."""
        with self._alone():
            clean_leftovers(self.folder)
            known = self.manifest().versions
            for folder in self.folder.glob("[0-9]" * 4):
                if int(folder.name) not in known:
                    shutil.rmtree(folder)

    def _write(self, manifest: Manifest) -> None:
        write_text_atomically(self._path, json.dumps(asdict(manifest), indent=1) + "\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time changes the manifest."""
        with disk_errors(self.folder), open(self.folder / "manifest.lock", "a", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def list_versions(versions: Versions) -> dict[str, Any]:
    """All versions and which one is served."""
    manifest = versions.manifest()
    rows = [
        {
            "version": number,
            "parent": one.parent,
            "accepted": one.accepted,
            "created": one.created,
            "why": versions.why(number),
        }
        for number, one in sorted(manifest.versions.items())
    ]
    return {"current": manifest.current, "versions": rows}


def _sources(run: Path) -> list[Path]:
    return [run / "final-adapter" / name for name in ADAPTER] + [
        run / name for name in REWARD if (run / name).is_file()
    ]


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(path: Path) -> Manifest:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        versions = {int(number): Version(**one) for number, one in told.pop("versions").items()}
        found = Manifest(**told, versions=versions)
        if found.current not in found.served():
            raise ValueError(f"version {found.current} is not there")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} can't be read ({type(error).__name__}: {error}); put back a copy of it.") from error
