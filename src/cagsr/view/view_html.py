"""The page: one HTML file that needs no other file and no network."""

import base64
import zlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cagsr.html_page import fill, page_file, script_digest, script_json
from cagsr.view.measure import REWARD, Answer, Floats, Measured, Plane

ROOM = 2_300_000
"""Bytes of attention on a page, compressed and in base64; the rest of a page takes far less than 0.7 MB."""


def quantise(attention: Floats) -> NDArray[np.uint8]:
    """Round attention in [0, 1] to 8 bits on the scale of its square root, which is finer where most values are.

    The value back is ``(q / 255) ** 2``; the error is at most ``sqrt(a) / 255 + 1 / 510 ** 2``.
    """
    return np.rint(255 * np.sqrt(np.clip(attention, 0.0, 1.0))).astype(np.uint8)


def pack(answer: Answer, planes: Sequence[Plane]) -> str:
    """Give an answer's planes one after the other, ``(planes, response, prompt)`` bytes, deflated, in base64."""
    return _packed([answer.planes[plane] for plane in planes])


def _packed(maps: Sequence[Floats]) -> str:
    content = b"".join(quantise(one).tobytes() for one in maps)
    return base64.b64encode(zlib.compress(content, 9 if len(content) < 1_000_000 else 6)).decode("ascii")


def pack_all(measured: Measured) -> tuple[tuple[Plane, ...], list[str | None]]:
    """Pack the attention of all answers so that a page has room for it: the planes on it, each answer's bytes or None.

    Heads are left out first, then single layers, then the whole attention of the lowest ranked answers.
    """
    without_heads = tuple(plane for plane in measured.planes if plane.head is None)
    for planes in dict.fromkeys((measured.planes, without_heads, (REWARD,))):
        packed = [pack(answer, planes) for answer in measured.answers]
        used = list(accumulate(map(len, packed)))
        if used[-1] <= ROOM:
            break
    return planes, [one if size <= ROOM else None for one, size in zip(packed, used, strict=True)]


def page_data(measured: Measured) -> dict[str, Any]:
    """Collect what the page's script needs, ready for JSON."""
    planes, packed = pack_all(measured)
    return {
        "prompt": {
            "tokens": list(measured.tokens),
            "word": list(measured.prompt.words),
            "words": list(measured.words),
            "share": _rounded(measured.share),
            "regions": _regions(measured),
        },
        "answers": [
            {
                "number": answer.number,
                "tokens": list(answer.tokens),
                "gains": _rounded(answer.gains),
                "focus": _rounded(answer.focus),
                "repeated": [int(one) for one in answer.repeated],
                "best": _rounded(answer.best),
                "map": one,
                "regions": None if answer.regions is None else _packed([answer.regions]),
            }
            for answer, one in zip(measured.answers, packed, strict=True)
        ],
        "planes": [[plane.layer, plane.head] for plane in planes],
        "threshold": measured.reward.coverage.threshold,
        "region_threshold": region_threshold(measured),
        "regions_of": "the sound" if measured.sound else "the images",
        "pooling": measured.pooling,
        "floor": measured.reward.focus.entropy_floor,
    }


def region_threshold(measured: Measured) -> float:
    """The attention at which a region of the images, or of the sound, counts as covered."""
    reward = measured.reward
    return reward.audio_coverage.threshold if measured.sound else reward.image_coverage.threshold


def _regions(measured: Measured) -> list[dict[str, Any]]:
    """Each region of the images, or of the sound: its place in shares of it, what it is called, and its share of the weight."""
    regions = measured.prompt.regions
    total = sum(one.weight for one in regions) or 1.0
    found = []
    for number, one in enumerate(regions):
        own = number - next(place for place, other in enumerate(regions) if other.image == one.image)
        name = f"region {own + 1} of image {one.image + 1}"
        if measured.sound:
            name = f"{one.left * measured.seconds:.2f} to {one.right * measured.seconds:.2f} s"
        place = [round(side, 5) for side in (one.left, one.top, one.right, one.bottom)]
        found.append({"image": one.image, "place": place, "name": name, "share": round(one.weight / total, 5)})
    return found


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 5) for value in values]


def render_page(measured: Measured) -> str:
    """Write the page.

    Everything that a user or a model wrote is escaped: in the markup by Jinja, in the data as JSON without ``<``, ``>``
    and ``&``. A content security policy in the page forbids every script but its own, and all connections.
    """
    data = page_data(measured)
    script = page_file("view", "view.js")
    return fill(
        "view",
        "page.html.jinja",
        m=measured,
        answers=measured.answers,
        maps=[one["map"] for one in data["answers"]],
        planes=data["planes"],
        region_threshold=data["region_threshold"],
        single_layers=sorted({layer for layer, _ in data["planes"] if layer is not None}),
        headed_layers=sorted({layer for layer, head in data["planes"] if head is not None}),
        heads=1 + max((head for _, head in data["planes"] if head is not None), default=-1),
        style=page_file("view", "view.css"),
        script=script,
        digest=script_digest(script),
        data=script_json(data),
    )
