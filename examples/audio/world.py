"""A world of sounds: words that are two tones each, spoken with pauses, and a careless transcriber.

Of a clip of three to six words he leaves words out, stops, more often than not, after the second, and now and then writes a word
that he likes, whatever he hears: that is what reinforcement learning is to mend. Which set a clip belongs to is decided by a hash
of its words, so the sets never meet.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Part = Literal["pairs", "prompts", "test"]
Row = dict[str, Any]

RATE = 16_000
"""Samples a second."""
SECONDS = 2.0
"""No clip is longer."""
NAMES = (
    "ash", "aspen", "beech", "birch", "cedar", "cherry", "elder", "elm", "fir", "hazel", "holly", "larch", "lime", "maple", "oak",
    "pine", "plum", "rowan", "willow", "yew",
)  # fmt: skip
PITCHES = (400, 750, 1300, 2200, 3800)
"""Hz."""
TONES = dict(zip(NAMES, permutations(PITCHES, 2), strict=True))
"""The two tones of each word, one after the other."""
NOISE = 0.003
"""Of full scale: it is never quite silent."""

LEFT_OUT = 0.15
"""How often the transcriber leaves a word out."""
STOPS = {1: 0.1, 2: 0.6, 3: 0.6, 4: 0.6, 5: 0.6}
"""How often he stops after so many words."""
HABIT, STOCK = 0.25, "oak"
"""How often he writes the word that he likes, whatever he hears."""


@dataclass(frozen=True)
class Word:
    """A word of a clip: where its tones begin, turn and end, in seconds."""

    name: str
    start: float
    turn: float
    end: float


Clip = tuple[Word, ...]


def rows(part: Part, count: int, seed: int) -> list[tuple[Clip, Row]]:
    """``count`` different clips of a set and their rows, with all words as the ``reference``; pairs have a transcript too."""
    draw = random.Random(f"{part} {seed}")
    found: dict[tuple[str, ...], tuple[Clip, Row]] = {}
    for clip in _endless(draw):
        names = tuple(word.name for word in clip)
        if _part(names) == part and names not in found:
            row: Row = {"prompt": "", "reference": told(list(names))}
            if part == "pairs":
                row["completion"] = transcript(names, draw)
            found[names] = clip, row
        if len(found) == count:
            break
    return list(found.values())


def _endless(draw: random.Random) -> Iterator[Clip]:
    while True:
        yield clip_of([draw.choice(NAMES) for _ in range(draw.randint(3, 6))], draw)


def clip_of(names: list[str], draw: random.Random) -> Clip:
    """Words at their times: two tones of 60 to 90 ms, behind pauses of 50 to 130 ms."""
    found, now = [], 0.0
    for name in names:
        start = now + draw.uniform(0.05, 0.13)
        turn = start + draw.uniform(0.06, 0.09)
        now = turn + draw.uniform(0.06, 0.09)
        found.append(Word(name, start, turn, now))
    return tuple(found)


def _part(names: tuple[str, ...]) -> Part:
    parts: tuple[Part, ...] = ("pairs", "prompts", "test")
    return parts[hashlib.sha256(" ".join(names).encode()).digest()[0] % 3]


def transcript(names: tuple[str, ...], draw: random.Random) -> str:
    """What the careless transcriber writes; a word at least."""
    said: list[str] = []
    for name in names:
        if draw.random() >= LEFT_OUT:
            said.append(name)
            if draw.random() < STOPS.get(len(said), 0.0):
                break
    if draw.random() < HABIT or not said:
        said.insert(draw.randint(0, len(said)), STOCK)
    return told(said)


def told(said: list[str]) -> str:
    """`` ash oak``: with the space before it a word is one token wherever it is."""
    return "".join(f" {one}" for one in said)


def sound(clip: Clip, seed: str) -> NDArray[np.float32]:
    """The samples of a clip, between -1 and 1; its loudness, its pitches and the noise are of the speaker's own."""
    draw = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()[:8]))
    samples = draw.normal(0, NOISE, round((clip[-1].end + draw.uniform(0.05, 0.1)) * RATE))
    pitch = draw.uniform(0.97, 1.03)
    for word in clip:
        loud = draw.uniform(0.15, 0.4)
        low, high = TONES[word.name]
        for hertz, start, end in ((low, word.start, word.turn), (high, word.turn, word.end)):
            first, last = round(start * RATE), round(end * RATE)
            times = np.arange(last - first) / RATE
            fade = np.minimum(1, np.minimum(times, times[::-1]) / 0.005)
            samples[first:last] += loud * fade * np.sin(2 * np.pi * hertz * pitch * times)
    return samples.astype(np.float32)
