"""The images of a row, in TRL's form: a column ``images`` beside the prompt, or images within the parts of chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cagsr.errors import DataError
from cagsr.flow import Picture
from cagsr.prompts.media import folder_of, inside, parts_of, source_of
from cagsr.prompts.rows import Row

IMAGES, BOXES = "images", "boxes"
"""The columns."""
_BOX = tuple[float, float, float, float]
_BOXES = TypeAdapter(list[_BOX])
_BOXES_OF_IMAGES = TypeAdapter(list[list[_BOX]])
KINDS = ("image", "image_url")
"""Types of parts that are images: transformers' and OpenAI's."""
_IN_PARTS = ("image", "path", "url", "image_url")
"""Keys under which a part of type image may hold the image itself."""


def pictures_of(row: Row, messages: Sequence[Mapping[str, Any]] | None, where: str) -> tuple[Picture, ...]:
    """The images of a row: of its column, else of its messages' parts; with the regions of its column ``boxes``.

    DataError, which ``where`` (file and row) opens, for what can't be an image or boxes.
    """
    value = row.values.get(IMAGES)
    given = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    within = inside(messages, KINDS, _IN_PARTS)
    if given and within:
        raise DataError(f"{where}: has images in a column and within its messages; give each image once.")
    folder = folder_of(row)
    pictures = tuple(
        _picture(one, folder, f"{where}, image {number}") for number, one in enumerate(given or within, start=1)
    )
    return _with_boxes(pictures, row.values.get(BOXES), where)


def has_images(row: Row, messages: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a row has images, whatever they are."""
    return bool(row.values.get(IMAGES)) or any(image_parts(message.get("content")) for message in messages or ())


def image_parts(content: Any) -> list[Mapping[str, Any]]:
    """The parts of a message's content that are images."""
    return parts_of(content, KINDS)


def _picture(value: Any, folder: Path, name: str) -> Picture:
    if hasattr(value, "convert"):
        return Picture(value, name)
    return Picture(*source_of(value, folder, name, "an image", "a PIL image"))


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
