"""Where the images and sounds of rows come from: files of the data's folder, data URLs, bytes; nothing is downloaded."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cagsr.errors import DataError
from cagsr.prompts.rows import Row


def folder_of(row: Row) -> Path:
    """The folder from which the paths in a row count."""
    return Path(row.source).parent if Path(row.source).is_file() else Path()


def parts_of(content: Any, kinds: Sequence[str]) -> list[Mapping[str, Any]]:
    """The parts of a message's content that are of certain types."""
    if not isinstance(content, list | tuple):
        return []
    return [part for part in content if isinstance(part, Mapping) and part.get("type") in kinds]


def inside(messages: Sequence[Mapping[str, Any]] | None, kinds: Sequence[str], keys: Sequence[str]) -> list[Any]:
    """What the parts of certain types hold under any of ``keys``, in their order."""
    return [
        part[key]
        for message in messages or ()
        for part in parts_of(message.get("content"), kinds)
        for key in keys
        if part.get(key) is not None
    ]


def source_of(value: Any, folder: Path, name: str, kind: str, other: str) -> tuple[str | bytes, str]:
    """A file's path or bytes, and what it is called in messages, which ``name`` opens.

    ``kind`` is what it should be, as an image, and ``other`` what else it may be in memory, both for messages. DataError for
    anything else, and for what is not on this machine.
    """
    if isinstance(value, Mapping):  # as datasets holds what is not decoded, and OpenAI's image_url
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, bytes):
        return value, name
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}: {kind} is a file's path or {other}, and this is a {type(value).__name__}.")
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True), name
        except binascii.Error as error:
            raise DataError(f"{name}: its data URL holds no base64 ({error}).") from error
    if "://" in value and not value.startswith("file://"):
        raise DataError(f"{name}: {value} is not on this machine; download it and give the file's path.")
    path = value.removeprefix("file://")
    return str(folder / path), f"{name} ({path})"
