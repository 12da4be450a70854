"""Files and folders that are either the old one or the whole new one, also after a kill or on a full disk.

Everything is written under a temporary name in the same folder, brought to the disk (fsync) and renamed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cagsr.errors import RunError

TEMPORARY = ".cagsr-tmp"
"""Ending of names that are being written."""
REPLACED = ".cagsr-old"
"""Ending of folders moved aside, because a folder can't be renamed over another one."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _disk_is_full(error: Exception) -> bool:
    """Whether ``error`` says that there is no room left (safetensors hides the errno in its text)."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found.group(1)) in _FULL


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of writing ``path`` (Python's and safetensors') into one sentence.

    Raises:
        RunError: the disk is full, or ``path`` can't be written for another reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _disk_is_full(error):
            raise RunError(
                f"{path} can't be written because the disk is full: free some space, then go on with --run.resume True."
            ) from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"{path} can't be written ({reason}): make it writable or choose another folder.") from error


def sync(path: Path) -> None:
    """Bring a file's contents, or a folder's entries (names, renames), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment ``path`` is the old file or the whole new one.

    Raises:
        RunError: the disk is full or ``path`` can't be written; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """As ``write_bytes_atomically``, for text (UTF-8)."""
    write_bytes_atomically(path, text.encode())


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill in the middle leaves a leftover with a temporary name, never half of ``path``."""
    doomed = path.with_name(f".{path.name}{TEMPORARY}")
    with disk_errors(path):
        if doomed.exists():
            shutil.rmtree(doomed)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block ends without an exception.

    Where ``path`` exists it is moved aside, replaced and then deleted; a kill between the two renames is mended by
    ``clean_leftovers``. After an exception ``path`` is as it was and the temporary folder is gone.

    Raises:
        RunError: the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    replaced = path.with_name(f".{path.name}{REPLACED}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        try:
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666  # safetensors makes its files private whatever the umask
            for file in temporary.rglob("*"):
                if not file.is_dir():
                    file.chmod(mode)
                sync(file)
            sync(temporary)
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Remove what a kill left in ``folder`` under temporary names, and put back a folder that was moved aside.

    Raises:
        RunError: a leftover can't be removed.
    """
    with disk_errors(folder):
        for leftover in folder.glob(f".*{REPLACED}"):
            original = leftover.with_name(leftover.name.removeprefix(".").removesuffix(REPLACED))
            if original.exists():
                shutil.rmtree(leftover)
            else:
                os.replace(leftover, original)
        for leftover in folder.glob(f".*{TEMPORARY}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
