"""What the self-contained pages share: templates, numbers as text, and scripts that a security policy names by their hash."""

import base64
import hashlib
import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup


@cache
def templates(room: str, *, html: bool = True) -> Environment:
    """The templates in a room's folder; those of HTML escape everything that is filled in."""
    environment = Environment(
        loader=PackageLoader("cagsr", room),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters.update(number=lambda value: minus(f"{value:.4g}"), minus=minus, duration=duration)
    environment.tests["finite"] = math.isfinite
    return environment


def fill(room: str, name: str, *, escaped: bool = True, **content: Any) -> str:
    """A room's template with its content, ``escaped`` as HTML."""
    text: str = templates(room, html=escaped).get_template(name).render(content)
    return text


def minus(number: str) -> str:
    """A number as text, with a true minus."""
    return number.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Seconds as people say them: ``48.2 s``, ``5 min 12 s``, ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def page_file(room: str, name: str) -> Markup:
    """A script or style sheet in a room's folder, to stand in a page as it is."""
    return Markup(files(f"cagsr.{room}").joinpath(name).read_text(encoding="utf-8"))


def script_json(data: Any) -> Markup:
    """Write JSON that can stand inside a script element: no tag, comment or entity can begin in it."""
    return htmlsafe_json_dumps(data, allow_nan=False, separators=(",", ":"))


def script_digest(script: str) -> str:
    """The hash by which a content security policy allows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
