"""Regions of images, as words are of a text: what an answer can look at, how much each matters, and which places belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cagsr.config import SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, Picture, Region
from cagsr.models.pictures import open_picture
from cagsr.models.vision import Points, Vision

if TYPE_CHECKING:
    from PIL.Image import Image


def with_regions(
    encoded: EncodedPrompt, counts: Sequence[int], vision: Vision, salience: SalienceConfig, where: str
) -> EncodedPrompt:
    """Give a prompt the regions of its images, and each place its region.

    ``counts`` are the places of each image. Of an image with boxes those are its regions, else the cells of a grid of
    ``image_grid`` by ``image_grid``; a cell without a place of its own is none. DataError, which ``where`` opens, for a box
    outside its image and as :meth:`Vision.points`.
    """
    pictures = encoded.prompt.images
    images = [open_picture(picture) for picture in pictures]
    owner = _owners(encoded, counts, vision)
    places = np.full(len(owner), -1)
    regions: list[Region] = []
    for number, points in enumerate(vision.points(pictures, images, counts, where)):
        cells = _cells(pictures[number], images[number], number, salience.image_grid, where)
        own = boxes_of(points, cells) if pictures[number].boxes else _cells_of(points, salience.image_grid)
        held = sorted(set(own[own >= 0].tolist()))
        place_of = {cell: len(regions) + place for place, cell in enumerate(held)}
        places[owner == number] = [place_of.get(cell, -1) for cell in own.tolist()]
        weights = _contrast(images[number], [cells[cell] for cell in held], salience.image_weights)
        regions += [replace(cells[cell], weight=weight) for cell, weight in zip(held, weights, strict=True)]
    return replace(encoded, regions=tuple(regions), places=tuple(places.tolist()))


def _owners(encoded: EncodedPrompt, counts: Sequence[int], vision: Vision) -> np.ndarray:
    """The image that each place is a piece of, -1 for none."""
    pieces = np.repeat(np.arange(len(counts)), counts)
    if vision.states is not None:
        return pieces
    owners = np.full(len(encoded.ids), -1)
    owners[np.asarray(encoded.ids) == vision.token_id] = pieces
    return owners


def _cells(picture: Picture, image: Image, number: int, grid: int, where: str) -> list[Region]:
    """The regions that an image could have, in shares of it."""
    if picture.boxes is None:
        steps = [step / grid for step in range(grid + 1)]
        return [
            Region(number, steps[column], steps[row], steps[column + 1], steps[row + 1], 0.0)
            for row in range(grid)
            for column in range(grid)
        ]
    width, height = image.size
    for left, top, right, bottom in picture.boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DataError(
                f"{where}: the box [{left:g}, {top:g}, {right:g}, {bottom:g}] does not lie in image {number + 1} of {width} x "
                f"{height} pixels (0 <= left < right <= width, 0 <= top < bottom <= height)."
            )
    return [
        Region(number, left / width, top / height, right / width, bottom / height, 0.0)
        for left, top, right, bottom in picture.boxes
    ]


def _cells_of(points: Points, grid: int) -> np.ndarray:
    """The cell of a grid that each point lies in, row by row; -1 for none."""
    inside = np.isfinite(points).all(axis=1)
    column, row = (np.nan_to_num(points) * grid).astype(int).clip(0, grid - 1).T
    return np.where(inside, row * grid + column, -1)


def boxes_of(points: Points, boxes: Sequence[Region]) -> np.ndarray:
    """The smallest box that each point lies in, -1 for none; a box in which none lies has the one next to its middle."""
    x, y = points.T
    own = np.full(len(points), -1)
    size = [(box.right - box.left) * (box.bottom - box.top) for box in boxes]
    for number in np.argsort(size, kind="stable")[::-1]:
        box = boxes[number]
        inside = (box.left <= x) & (x <= box.right) & (box.top <= y) & (y <= box.bottom)
        if not inside.any():
            away = (x - (box.left + box.right) / 2) ** 2 + (y - (box.top + box.bottom) / 2) ** 2
            inside = np.arange(len(points)) == np.nanargmin(away)
        own[inside] = number
    return own


def _contrast(image: Image, regions: Sequence[Region], how: str) -> list[float]:
    """What regions weigh: all 1, or how far their pixels are from the colour that most of the image has.

    The root of the mean squared distance to the image's median colour, in shares of the largest there is: a region of nothing
    but background weighs 0, one filled by a thing of another colour as much as one that shows its edge. (Distance from the
    image's mean colour: Achanta and others, Frequency-tuned salient region detection, 2009; the median is the background's
    where that fills more than half.) All 1 where every region weighs 0.
    """
    pixels = np.asarray(image, dtype=np.float64) / 255
    height, width = pixels.shape[:2]
    away = ((pixels - np.median(pixels, axis=(0, 1))) ** 2).mean(axis=2)
    found = []
    for one in regions:
        rows = slice(int(one.top * height), max(int(one.top * height) + 1, round(one.bottom * height)))
        columns = slice(int(one.left * width), max(int(one.left * width) + 1, round(one.right * width)))
        found.append(float(away[rows, columns].mean() ** 0.5))
    return found if how == "contrast" and any(found) else [1.0] * len(regions)
