"""Files and folders that are either the old one or the whole new one, also after a kill or on a full disk.

Everything is written under a temporary name in the same folder, brought to the disk (fsync) and renamed.
"""

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
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|No space left on device|unexpected pos \d+ vs \d+")
"""What torch.save says when it can't write; its reader fails in other words, and so does everything else in a training."""


def _disk_is_full(error: Exception) -> bool:
    """Whether ``error`` says that there is no room left (safetensors hides the errno in its text, torch tells none)."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, RuntimeError):
        return _TORCH_WRITER.search(str(error)) is not None
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found.group(1)) in _FULL


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of writing ``path`` (Python's, safetensors' and those of torch.save) into one sentence, a RunError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if _disk_is_full(error):
            raise RunError(
                f"{path} can't be written because the disk is full: free some space, then give the same command again, with "
                "--resume where a training had begun."
            ) from error
        if isinstance(error, RuntimeError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"{path} can't be written ({reason}): make it writable or choose another folder.") from error


def sync(path: Path) -> None:
    """Bring a file's contents, or a folder's entries (names, renames), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Delete a folder, a file or a link (never what a link points to); nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment ``path`` is the old file or the whole new one.

    A link is followed: what it points to becomes the new file. What is no file (/dev/null, /dev/stdout, a pipe) is written
    to as it is. Raises RunError where it can't be written; the old file is then untouched.
    """
    with disk_errors(path):
        if _is_stream(path):
            # Appended: standard output may be a file that holds something already.
            with open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as stream:
                stream.write(content)
            return
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        temporary = target.with_name(f".{target.name}{TEMPORARY}")
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)


def _is_stream(path: Path) -> bool:
    """Whether something else than a file lies at ``path``, or a file that is open already (/dev/stdout > file)."""
    if not path.exists():
        return False
    named = os.path.realpath(path.parent) in ("/dev", f"/proc/{os.getpid()}/fd")
    return not path.is_file() or (named and path.is_symlink())


def write_text_atomically(path: Path, text: str) -> None:
    """As ``write_bytes_atomically``, for text (UTF-8)."""
    write_bytes_atomically(path, text.encode())


def remove_folder(path: Path) -> None:
    """Delete a folder, or a link to one; a kill in the middle leaves a leftover with a temporary name, never half of it."""
    doomed = path.with_name(f".{path.name}{TEMPORARY}")
    with disk_errors(path):
        delete(doomed)
        os.replace(path, doomed)
        delete(doomed)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block ends without an exception.

    Where ``path`` exists it is moved aside, replaced and then deleted; a kill between the two renames is mended by
    ``clean_leftovers``. After an exception (RunError: it can't be written) ``path`` is as it was and the temporary folder gone.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    replaced = path.with_name(f".{path.name}{REPLACED}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        delete(temporary)
        try:
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666  # safetensors makes its files private whatever the umask
            for file in temporary.rglob("*"):
                if not file.is_dir():
                    file.chmod(mode)
                sync(file)
            sync(temporary)
            if path.exists() or path.is_symlink():
                os.replace(path, replaced)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(path.parent)
        if replaced.is_symlink():
            replaced.unlink()
        shutil.rmtree(replaced, ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Remove (else RunError) what a kill left under temporary names, and put back a folder that was moved aside."""
    with disk_errors(folder):
        for leftover in folder.glob(f".*{REPLACED}"):
            original = leftover.with_name(leftover.name.removeprefix(".").removesuffix(REPLACED))
            if original.exists():
                delete(leftover)
            else:
                os.replace(leftover, original)
        for leftover in folder.glob(f".*{TEMPORARY}"):
            delete(leftover)
