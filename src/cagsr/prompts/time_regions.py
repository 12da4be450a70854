"""Regions of a sound's time, as words are of a text: what an answer can look at, how much each matters, which states are in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cagsr.config import SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, Region
from cagsr.models.hearing import Hearing
from cagsr.models.sounds import Samples, open_sound
from cagsr.prompts.regions import boxes_of

FRAME = 0.02
"""Seconds over which loudness is measured."""
BELOW, FLOOR = 30.0, -55.0
"""Decibels below the loudest frame, and of full scale, under which a frame is silence."""
_SPECK = 1e-9
"""Seconds by which times are off as fractions of two."""


def with_time_regions(encoded: EncodedPrompt, hearing: Hearing, salience: SalienceConfig, where: str) -> EncodedPrompt:
    """Give a prompt the regions of its sound, and each encoder state its region.

    Of a sound with spans those are its regions, else stretches of ``audio_seconds``. State k stands at ``k * hearing.step``
    seconds; what fills the sound up to the encoder's length is no region. DataError, which ``where`` opens, for a span outside
    of the sound, and as :func:`open_sound`.
    """
    (sound,) = encoded.prompt.sounds
    samples = open_sound(sound, hearing.rate)
    length = len(samples) / hearing.rate
    times = np.arange(hearing.states) * hearing.step
    times = np.where(times < length - _SPECK, times, np.nan)
    spans = sound.spans
    if spans is None:
        spans = even_spans(length, salience.audio_seconds)
        own = np.nan_to_num(np.floor(times / salience.audio_seconds + _SPECK), nan=-1).astype(int)
    else:
        for start, end in spans:
            if not 0 <= start < end <= length + FRAME:
                raise DataError(
                    f"{where}: the span [{start:g}, {end:g}] does not lie in the sound of {length:.2f} seconds (0 <= start < end)."
                )
        middles = np.stack([times / length, np.full_like(times, 0.5)], axis=1)
        own = boxes_of(middles, _regions(spans, length))
    held = sorted(set(own[own >= 0].tolist()))
    place_of = {span: place for place, span in enumerate(held)}
    kept = [spans[span] for span in held]
    weights = loudness(samples, hearing.rate, kept) if salience.audio_weights == "loudness" else [1.0] * len(kept)
    return replace(
        encoded,
        regions=tuple(
            replace(region, weight=weight) for region, weight in zip(_regions(kept, length), weights, strict=True)
        ),
        places=tuple(place_of.get(span, -1) for span in own.tolist()),
    )


def even_spans(length: float, seconds: float) -> tuple[tuple[float, float], ...]:
    """Stretches of ``seconds``, the last one as long as is left."""
    count = int(np.ceil(length / seconds - _SPECK))
    return tuple((number * seconds, min(length, (number + 1) * seconds)) for number in range(count))


def loudness(samples: Samples, rate: int, spans: Sequence[tuple[float, float]]) -> list[float]:
    """What spans weigh: the mean over their frames of how far each is above silence, 1 the loudest; all 1 where nothing sounds.

    A frame's level is ``20 log10`` of the standard deviation of its samples; silence is what lies ``BELOW`` decibels under the
    loudest frame, or under ``FLOOR`` (the energy-based voice activity detector of Kinnunen and Li, An overview of text-independent
    speaker recognition, 2010, which decides by frame).
    """
    size = max(1, round(FRAME * rate))
    frames: NDArray[np.float64] = np.zeros((-(-len(samples) // size), size))
    frames.flat[: len(samples)] = samples
    level = 20 * np.log10(frames.std(axis=1) + 1e-12)
    above = np.where(level > FLOOR, (level - level.max() + BELOW).clip(0) / BELOW, 0.0)
    middles = (np.arange(len(frames)) + 0.5) * size / rate
    found = []
    for start, end in spans:
        inside = (start <= middles) & (middles < end)
        if not inside.any():
            inside = np.arange(len(frames)) == np.abs(middles - (start + end) / 2).argmin()
        found.append(float(above[inside].mean()))
    return found if any(found) else [1.0] * len(spans)


def _regions(spans: Sequence[tuple[float, float]], length: float) -> list[Region]:
    return [Region(0, start / length, 0.0, min(1.0, end / length), 1.0, 0.0) for start, end in spans]
