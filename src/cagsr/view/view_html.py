"""The page: one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from numpy.typing import NDArray

from cagsr.view.measure import Answer, Floats, Measured
from cagsr.view.planes import REWARD, Plane

ROOM = 2_300_000
"""Bytes of attention on a page, compressed and in base64; the rest of a page takes far less than 0.7 MB."""
QUANTISED = "Attention on this page is rounded to 8 bits (at most 0.004 off); the terms are not."


def quantise(attention: Floats) -> NDArray[np.uint8]:
    """Round attention in [0, 1] to 8 bits on the scale of its square root, which is finer where most values are.

    The value back is ``(q / 255) ** 2``; the error is at most ``sqrt(a) / 255 + 1 / 510 ** 2``.
    """
    return np.rint(255 * np.sqrt(np.clip(attention, 0.0, 1.0))).astype(np.uint8)


def pack(answer: Answer, planes: Sequence[Plane]) -> str:
    """Give an answer's planes one after the other, ``(planes, response, prompt)`` bytes, deflated, in base64."""
    content = b"".join(quantise(answer.planes[plane]).tobytes() for plane in planes)
    return base64.b64encode(zlib.compress(content, 9 if len(content) < 1_000_000 else 6)).decode("ascii")


def pack_all(measured: Measured) -> tuple[tuple[Plane, ...], list[str | None]]:
    """Pack the attention of all answers so that a page has room for it.

    Heads are left out first, then single layers, then the whole attention of the lowest ranked answers.

    Returns:
        The planes on the page, and each answer's bytes, None where they are left out.
    """
    without_heads = tuple(plane for plane in measured.planes if plane.head is None)
    for planes in dict.fromkeys((measured.planes, without_heads)):
        packed: list[str | None] = [pack(answer, planes) for answer in measured.answers]
        if sum(len(one or "") for one in packed) <= ROOM:
            return planes, packed
    only = (REWARD,)
    packed, used = [], 0
    for answer in measured.answers:
        one = pack(answer, only)
        used += len(one)
        packed.append(one if used <= ROOM else None)
    return only, packed


def page_data(measured: Measured) -> dict[str, Any]:
    """Collect what the page's script needs, ready for JSON."""
    planes, packed = pack_all(measured)
    return {
        "prompt": {
            "tokens": list(measured.tokens),
            "word": list(measured.prompt.words),
            "words": list(measured.words),
            "share": _rounded(measured.share),
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
            }
            for answer, one in zip(measured.answers, packed, strict=True)
        ],
        "planes": [[plane.layer, plane.head] for plane in planes],
        "threshold": measured.threshold,
        "pooling": measured.pooling,
        "floor": measured.entropy_floor,
    }


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 5) for value in values]


def render_page(measured: Measured) -> str:
    """Write the page.

    Everything that a user or a model wrote is escaped: in the markup by Jinja, in the data as JSON without ``<``, ``>``
    and ``&``. A content security policy in the page forbids every script but its own, and all connections.
    """
    folder = files("cagsr.view")
    script = folder.joinpath("view.js").read_text(encoding="utf-8")
    data = page_data(measured)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value: f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")
    environment.filters["number"] = lambda value: f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page: str = template.render(
        m=measured,
        answers=[
            _shown(answer, measured, one["map"] is None)
            for answer, one in zip(measured.answers, data["answers"], strict=True)
        ],
        notes=_notes(measured, data),
        layers=_several("layer", measured.layers),
        single_layers=sorted({layer for layer, _ in data["planes"] if layer is not None}),
        heads=1 + max((head for _, head in data["planes"] if head is not None), default=-1),
        style=Markup(folder.joinpath("view.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        data=Markup(as_json(data)),
    )
    return page


def as_json(data: Any) -> str:
    """Write JSON that can stand inside a script element: no tag, comment or entity can begin in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _shown(answer: Answer, measured: Measured, left_out: bool) -> dict[str, Any]:
    """What the template needs of an answer: its terms as bars on a scale common to all answers."""
    scale = max((abs(value) for one in measured.answers for value in one.contributions.values()), default=0.0) or 1.0
    terms, others = [], []
    for name, raw in answer.terms.items():
        applies = math.isfinite(raw)
        contribution = answer.contributions.get(name)
        entry = {"name": name, "label": name.replace("_", " "), "raw": raw if applies else None}
        if contribution is None:
            others.append(entry)
            continue
        width = 50 * abs(contribution) / scale
        entry |= {
            "weight": measured.weights[name],
            "contribution": contribution,
            "left": f"{50 - width if contribution < 0 else 50:.2f}",
            "width": f"{width:.2f}",
            "negative": contribution < 0,
        }
        terms.append(entry)
    return {
        "number": answer.number,
        "text": answer.text,
        "reward": answer.reward,
        "tokens": len(answer.tokens),
        "ended": answer.ended,
        "terms": terms,
        "others": others,
        "left_out": left_out,
    }


def _notes(measured: Measured, data: dict[str, Any]) -> list[str]:
    """What is worth saying about what is, and is not, on the page."""
    notes = [measured.scale]
    shown = [Plane(layer, head) for layer, head in data["planes"]]
    if len(shown) == 1:
        notes.append("Single layers and heads are left out, because the page would grow too large with them.")
    elif all(plane.head is None for plane in shown):
        notes.append("Single heads are left out, because the page would grow too large with them.")
    elif {plane.layer for plane in shown if plane.head is not None} != {plane.layer for plane in shown} - {None}:
        notes.append("Single heads are there for the layers that the reward reads, for the page's size.")
    missing = sum(one["map"] is None for one in data["answers"])
    if missing:
        notes.append(f"The attention of the {missing} lowest ranked answers is left out for the page's size.")
    notes.append(QUANTISED)
    return notes


def _several(what: str, numbers: Sequence[int]) -> str:
    """Name layers: ``layer 3``, ``layers 2 to 5``, ``layers 1, 4``."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    return f"{what}s {', '.join(map(str, numbers))}"
