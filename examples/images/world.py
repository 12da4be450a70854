"""A world of pictures: things in the fields of a 3 x 3 grid, and a careless annotator who writes captions.

A field holds nothing, or one to three equal things of one colour: ``northwest: two red circles``. Its facts are their number, their
colour and their shape. The annotator goes through the things in no order and stops, more often than not, after the second;
sometimes he leaves the colour or the number out, writes what is usual instead of what is there, or a stock phrase that he writes
of any picture: that is what reinforcement learning is to mend. Which set a picture belongs to is decided by a hash of what it
shows, so the sets never meet.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw

Part = Literal["pairs", "prompts", "test"]
Row = dict[str, Any]

PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
NUMBERS = ("one", "two", "three")
COLOURS = {
    "red": (214, 48, 49),
    "blue": (41, 98, 214),
    "green": (39, 154, 80),
    "yellow": (235, 190, 30),
    "purple": (142, 68, 173),
    "black": (35, 35, 40),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
USUAL = {"circle": "red", "square": "blue", "triangle": "yellow", "cross": "black", "ring": "purple"}
"""The colour that a shape has half of the time, and the annotator's when he doesn't look."""
FIELD = 20
"""Pixels of a field's side."""
SIDE = 3 * FIELD
"""Pixels of a picture's side."""
GROUND = (238, 236, 230)
"""The colour of what is empty."""
INSTRUCTIONS = ("Describe the picture.", "What is in the picture?", "Say what you see.")

STOPS = {1: 0.15, 2: 0.7, 3: 0.7, 4: 0.7, 5: 0.7}
"""How often the annotator stops after so many things."""
LEFT_OUT = 0.1
"""How often he leaves a colour out, and how often a number."""
USUAL_INSTEAD = 0.1
"""How often he writes the usual colour without looking."""
MISCOUNTED = 0.05
"""How often he writes another number."""
HABIT = 0.3
"""How often he writes his stock phrase, whatever the picture shows."""


@dataclass(frozen=True)
class Thing:
    """What a field holds: one to three equal shapes of one colour."""

    place: str
    number: str
    colour: str
    shape: str

    @property
    def noun(self) -> str:
        """``circle``, of more than one ``circles``."""
        return self.shape if self.number == "one" else SHAPES[self.shape]

    def said(self, *, number: bool = True, colour: bool = True) -> str:
        """``northwest: two red circles``."""
        words = [self.number] * number + [self.colour] * colour + [self.noun]
        return f"{self.place}: {' '.join(words)}"


STOCK = Thing("centre", "one", "red", "circle")
"""What the annotator likes to write."""


def rows(part: Part, count: int, seed: int) -> list[tuple[tuple[Thing, ...], Row]]:
    """``count`` different pictures of a set and their rows, with the facts; pairs have the annotator's caption too."""
    draw = random.Random(f"{part} {seed}")
    found: dict[tuple[Thing, ...], Row] = {}
    for things in _endless(draw):
        if _part(things) == part and things not in found:
            row: Row = {
                "prompt": [{"role": "user", "content": draw.choice(INSTRUCTIONS)}],
                "facts": [thing.said() for thing in things],
            }
            if part == "pairs":
                row["completion"] = [{"role": "assistant", "content": caption(things, draw)}]
            found[things] = row
        if len(found) == count:
            break
    return list(found.items())


def _endless(draw: random.Random) -> Iterator[tuple[Thing, ...]]:
    while True:
        yield things_of(draw)


def things_of(draw: random.Random) -> tuple[Thing, ...]:
    """Three to six things in different fields, in the order of reading."""
    places = sorted(draw.sample(range(len(PLACES)), draw.randint(3, 6)))
    found = []
    for place in places:
        shape = draw.choice(list(SHAPES))
        colour = USUAL[shape] if draw.random() < 0.4 else draw.choice(list(COLOURS))
        found.append(Thing(PLACES[place], draw.choice(NUMBERS), colour, shape))
    return tuple(found)


def _part(things: tuple[Thing, ...]) -> Part:
    parts: tuple[Part, ...] = ("pairs", "prompts", "test")
    return parts[hashlib.sha256(repr([thing.said() for thing in things]).encode()).digest()[0] % 3]


def caption(things: tuple[Thing, ...], draw: random.Random) -> str:
    """What the careless annotator writes."""
    order = draw.sample(things, len(things))
    said: list[str] = []
    for thing in order:
        number, colour = thing.number, thing.colour
        if draw.random() < MISCOUNTED:
            number = draw.choice(NUMBERS)
        if draw.random() < USUAL_INSTEAD:
            colour = USUAL[thing.shape]
        seen = Thing(thing.place, number, colour, thing.shape)
        said.append(seen.said(number=draw.random() >= LEFT_OUT, colour=draw.random() >= LEFT_OUT))
        if draw.random() < STOPS.get(len(said), 0.0):
            break
    if draw.random() < HABIT:
        said.insert(draw.randint(0, len(said)), STOCK.said())
    return told(said)


def told(said: list[str]) -> str:
    """`` Northwest: two red circles. East: one blue square.``: with the space before it a place is one token wherever it is."""
    return "".join(f" {one.capitalize()}." for one in said)


# ---- drawing ----


def picture(things: tuple[Thing, ...], draw: random.Random) -> Image.Image:
    """A picture of ``SIDE`` x ``SIDE`` pixels, RGB; things are moved about in their fields a little."""
    many = 4  # drawn larger and made small, so that edges are smooth
    image = Image.new("RGB", (SIDE * many, SIDE * many), GROUND)
    brush = ImageDraw.Draw(image)
    for thing in things:
        place = PLACES.index(thing.place)
        left, top = (place % 3) * FIELD, (place // 3) * FIELD
        for x, y in _spots(thing.number):
            size = (3.9 if thing.number != "one" else 5.5) + draw.uniform(-0.4, 0.4)
            x, y = left + x + draw.uniform(-0.8, 0.8), top + y + draw.uniform(-0.8, 0.8)
            shade = draw.randint(-12, 12)
            red, green, blue = (min(255, max(0, part + shade)) for part in COLOURS[thing.colour])
            _shape(brush, thing.shape, x * many, y * many, size * many, (red, green, blue))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _spots(number: str) -> Sequence[tuple[float, float]]:
    """Middles of so many things in a field, in pixels."""
    return {"one": [(10, 10)], "two": [(5, 10), (15, 10)], "three": [(5, 5), (15, 5), (10, 15)]}[number]


def _shape(brush: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    if shape == "circle":
        brush.ellipse([x - r, y - r, x + r, y + r], fill=colour)
    elif shape == "ring":
        brush.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=round(r * 0.45))
    elif shape == "square":
        brush.rectangle([x - r, y - r, x + r, y + r], fill=colour)
    elif shape == "triangle":
        brush.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill=colour)
    else:
        brush.line([x - r, y - r, x + r, y + r], fill=colour, width=round(r * 0.6))
        brush.line([x - r, y + r, x + r, y - r], fill=colour, width=round(r * 0.6))
