"""The images of a row, in TRL's form: a column ``images`` beside the prompt, or images within the parts of chat messages."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cagsr.errors import DataError
from cagsr.flow import Picture
from cagsr.prompts.rows import Row

IMAGES, BOXES = "images", "boxes"
"""The columns."""
_BOX = tuple[float, float, float, float]
_BOXES = TypeAdapter(list[_BOX])
_BOXES_OF_IMAGES = TypeAdapter(list[list[_BOX]])
_IN_PARTS = ("image", "path", "url", "image_url")
"""Keys under which a part of type image may hold the image itself."""


def pictures_of(row: Row, messages: Sequence[Mapping[str, Any]] | None, where: str) -> tuple[Picture, ...]:
    """The images of a row: of its column, else of its messages' parts; with the regions of its column ``boxes``.

    DataError, which ``where`` (file and row) opens, for what can't be an image or boxes.
    """
    value = row.values.get(IMAGES)
    given = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    inside = [
        part[key]
        for message in messages or ()
        for part in image_parts(message.get("content"))
        for key in _IN_PARTS
        if part.get(key) is not None
    ]
    if given and inside:
        raise DataError(f"{where}: has images in a column and within its messages; give each image once.")
    folder = Path(row.source).parent if Path(row.source).is_file() else Path()
    pictures = tuple(
        _picture(one, folder, f"{where}, image {number}") for number, one in enumerate(given or inside, start=1)
    )
    return _with_boxes(pictures, row.values.get(BOXES), where)


def has_images(row: Row, messages: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a row has images, whatever they are."""
    return bool(row.values.get(IMAGES)) or any(image_parts(message.get("content")) for message in messages or ())


def image_parts(content: Any) -> list[Mapping[str, Any]]:
    """The parts of a message's content that are images."""
    if not isinstance(content, list | tuple):
        return []
    return [part for part in content if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")]


def _picture(value: Any, folder: Path, name: str) -> Picture:
    if isinstance(value, Mapping):  # as datasets holds an image that is not decoded, and OpenAI's image_url
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return Picture(value, name)
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}: an image is a file's path or a PIL image, and this is a {type(value).__name__}.")
    if value.startswith("data:"):
        try:
            return Picture(base64.b64decode(value.partition(",")[2], validate=True), name)
        except binascii.Error as error:
            raise DataError(f"{name}: its data URL holds no base64 ({error}).") from error
    if "://" in value and not value.startswith("file://"):
        raise DataError(f"{name}: {value} is not on this machine; download it and give the file's path.")
    path = value.removeprefix("file://")
    return Picture(str(folder / path), f"{name} ({path})")


def _with_boxes(pictures: tuple[Picture, ...], value: Any, where: str) -> tuple[Picture, ...]:
    if value is None or not pictures:
        return pictures
    try:
        boxes = _BOXES_OF_IMAGES.validate_python(value)
    except ValidationError:
        try:
            boxes = [_BOXES.validate_python(value)]
        except ValidationError as error:
            raise DataError(
                f"{where}: column '{BOXES}' must hold a list of boxes [left, top, right, bottom] in pixels, a list for each image."
            ) from error
    if len(boxes) != len(pictures):
        raise DataError(
            f"{where}: column '{BOXES}' holds boxes for {len(boxes)} images, and the prompt has {len(pictures)}."
        )
    return tuple(replace(one, boxes=tuple(own) or None) for one, own in zip(pictures, boxes, strict=True))
