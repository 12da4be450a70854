"""Rewrite matplotlib's SVG files in place, several times smaller: ``python -m tools.compact_svg docs``.

What a reader sees stays to a tenth of a point. What goes: metadata, groups that only carry a name, styles that repeat, the
list of fonts at every word, digits, white on white. Lines of one style become one path, and so do a curve's markers. A file
that is small already comes out as it is.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
FONTS = "DejaVu Sans,Verdana,sans-serif"
SHORT = 24
"""Characters of a marker's path (a tick, the cap of an interval) up to which it is written where it is used."""
DEFAULTS = {"stroke-width": "1", "fill": "#000", "stroke": "none", "text-anchor": "start"}
DROPPED = ("font-family", "stroke-linecap", "stroke-linejoin")

Style = dict[str, str]
Definition = tuple[str, str, str]
"""Tag, attributes, contents."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """Something that is drawn: the contents of a path, the place of a marker, or an element with room for attributes."""

    kind: Literal["line", "area", "marker", "text"]
    style: Style
    what: str
    marker: str = ""
    """Of a marker: its path."""


def compact(text: str) -> str:
    """Write an SVG of matplotlib's with fewer characters; what has been through here comes out unchanged."""
    if "<metadata>" not in text:
        return text
    root = ElementTree.fromstring(text)
    named = {one.attrib["id"]: one for defs in root.iter(f"{{{SVG}}}defs") for one in defs if "id" in one.attrib}
    named |= {one.attrib["id"]: one for one in root.iter(f"{{{SVG}}}clipPath")}
    parts: list[Part] = []
    for part in _parts(root, {}, named):
        if part.kind != "area" or part.style != {"fill": "#fff"} or not parts:  # a white panel on white paper
            parts.append(part)
    size = [_number(one) for one in root.attrib["viewBox"].split()]
    definitions: dict[Definition, str] = {}
    body = "".join(_written(group, definitions, named) for group in _groups(parts))
    defined = "".join(f'<{tag} id="{name}"{more}>{inside}</{tag}>' for (tag, more, inside), name in definitions.items())
    defined = f"<defs>{defined}</defs>" if defined else ""
    return (
        f'<svg xmlns="{SVG}" viewBox="{" ".join(size)}" width="{size[2]}pt" height="{size[3]}pt" '
        f'font-family="{FONTS}" stroke-linejoin="round">{defined}{body}</svg>\n'
    )


def _parts(element: Element, outer: Style, named: dict[str, Element]) -> Iterator[Part]:
    """What is drawn, in order."""
    for one in element:
        tag, style = one.tag.removeprefix(f"{{{SVG}}}"), _style(one, outer)
        if tag == "g" and "transform" in one.attrib:  # a formula: words at places of their own
            [(x, y)] = re.findall(r"^translate\((\S+) (\S+)\)$", one.attrib["transform"])
            for word in one.iter(f"{{{SVG}}}tspan"):
                place = [_number(float(x) + float(word.attrib["x"])), _number(float(y) + float(word.attrib["y"]))]
                yield _text(word, _style(word, style), f' x="{place[0]}" y="{place[1]}"')
        elif tag == "g":
            yield from _parts(one, style, named)
        elif tag == "path":
            points = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", one.attrib["d"])]
            if "clip-path" in style and _within(points, named[style["clip-path"]]):
                del style["clip-path"]
            yield Part("line" if style.get("fill") == "none" else "area", style, _path(one.attrib["d"]))
        elif tag == "use":
            shape = named[one.attrib[HREF].removeprefix("#")]
            style, at = _style(shape, style), (float(one.attrib["x"]), float(one.attrib["y"]))
            if "clip-path" in style and _within([at], named[style["clip-path"]]):
                del style["clip-path"]
            if len(shape.attrib["d"]) <= SHORT:
                yield Part("line", style | {"fill": "none"}, _path(shape.attrib["d"], *at))
            else:
                yield Part("marker", style, f"{at[0]} {at[1]}", shape.attrib["d"])
        elif tag == "text":
            where = "".join(f' {key}="{_number(one.attrib[key])}"' for key in ("x", "y") if key in one.attrib)
            turned = re.sub(r"-?\d+\.\d+", lambda found: _number(found[0]), one.attrib.get("transform", ""))
            if turned and not turned.startswith("rotate(-0 "):
                where += f' transform="{turned}"'
            yield _text(one, style, where)


def _text(one: Element, style: Style, where: str) -> Part:
    escaped = (one.text or "").replace("&", "&amp;").replace("<", "&lt;")
    return Part("text", style, f"<text{where}>{escaped}</text>")


def _style(one: Element, outer: Style) -> Style:
    """The properties of an element with those it inherits."""
    own = dict(re.findall(r"([\w-]+):\s*([^;]+)", one.attrib.get("style", "")))
    if clip := one.attrib.get("clip-path"):
        own["clip-path"] = clip.removeprefix("url(#").removesuffix(")")
    short = {key: re.sub(r"^#(.)\1(.)\2(.)\3$", r"#\1\2\3", value) for key, value in own.items() if key not in DROPPED}
    return {key: value for key, value in (outer | short).items() if DEFAULTS.get(key) != value}


def _within(points: Sequence[Point], clip: Element) -> bool:
    """Whether clipping changes nothing."""
    left, top, width, height = (float(clip[0].attrib[key]) for key in ("x", "y", "width", "height"))
    return all(-0.1 <= x - left <= width + 0.1 and -0.1 <= y - top <= height + 0.1 for x, y in points)


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Bring together what has one style; nothing is moved to the other side of an area, which could hide it."""
    groups: list[list[Part]] = []
    since = 0
    for part in parts:
        alike = [one for one in groups[since:] if dataclasses.replace(one[0], what=part.what) == part]
        if alike and part.kind != "area":
            alike[0].append(part)
        else:
            groups.append([part])
            since = len(groups) if part.kind == "area" else since
    return groups


def _written(group: Sequence[Part], definitions: dict[Definition, str], named: dict[str, Element]) -> str:
    """Write a group, and what it needs to be defined."""
    style = dict(group[0].style)
    if clip := style.get("clip-path"):
        [shape] = named[clip]
        sizes = "".join(f' {key}="{_number(shape.attrib[key])}"' for key in ("x", "y", "width", "height"))
        style["clip-path"] = f"url(#{_defined(definitions, ('clipPath', '', f'<rect{sizes}/>'))})"
    if group[0].kind == "marker" and len(group) == 1:
        x, y = map(float, group[0].what.split())
        return f'<path{_attributes(style)} d="{_path(group[0].marker, x, y)}"/>'
    if group[0].kind == "marker":
        place = {"clip-path": style.pop("clip-path")} if clip else {}
        drawn = f'<path{_attributes(style)} d="{_path(group[0].marker)}"/>'
        how = ' overflow="visible" markerUnits="userSpaceOnUse"'
        name = f"url(#{_defined(definitions, ('marker', how, drawn))})"
        at = _path("M" + "L".join(part.what for part in group))
        ends = {"marker-start": name, "marker-mid": name, "marker-end": name}
        return f'<path{_attributes({"fill": "none"} | place | ends)} d="{at}"/>'
    found = "".join(part.what for part in group)
    if group[0].kind != "text":
        return f'<path{_attributes(style)} d="{found}"/>'
    return (
        found.replace("<text", f"<text{_attributes(style)}")
        if len(group) == 1
        else f"<g{_attributes(style)}>{found}</g>"
    )


def _defined(definitions: dict[Definition, str], one: Definition) -> str:
    """Give the name of a definition, which is made where it is new."""
    return definitions.setdefault(one, f"d{len(definitions)}")


def _attributes(style: Style) -> str:
    return "".join(f' {key}="{value}"' for key, value in style.items())


def _path(text: str, x: float = 0.0, y: float = 0.0) -> str:
    """A path moved by (x, y), in relative coordinates of one digit; the rounding does not add up."""
    found, at, last = "", (0.0, 0.0), ""
    for command, numbers in re.findall(r"([MLQCzZ])([^MLQCzZ]*)", text):
        if command in "zZ":
            found, last = found + "z", "z"
            continue
        values = [float(one) for one in numbers.split()]
        points = [(round(a + x, 1), round(b + y, 1)) for a, b in zip(values[::2], values[1::2], strict=True)]
        if command == "M":
            found, last = f"{found}M{_joined(points)}", "M"
        elif points[-1] != at:
            moved = _joined([(a - at[0], b - at[1]) for a, b in points])
            found += command.lower() + moved if command != last else ("" if moved.startswith("-") else " ") + moved
            last = command
        at = points[-1]
    return found


def _joined(points: Sequence[Point]) -> str:
    return " ".join(_number(value) for point in points for value in point).replace(" -", "-")


def _number(value: float | str) -> str:
    text = f"{float(value):.1f}".removesuffix(".0")
    return "0" if text == "-0" else re.sub(r"^(-?)0\.", r"\1.", text)


def main(arguments: list[str]) -> int:
    """Compact all SVG files below the folders."""
    for path in sorted(path for folder in arguments for path in Path(folder).rglob("*.svg")):
        text = path.read_text(encoding="utf-8")
        smaller = compact(text)
        if smaller != text:
            path.write_text(smaller, encoding="utf-8")
            print(f"{path}: {len(text):,} -> {len(smaller):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
