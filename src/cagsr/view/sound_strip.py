"""A sound on a page: its waveform as a picture over which regions of time lie, and the sound itself to listen to."""

from __future__ import annotations

import base64

import numpy as np
from scipy.signal import resample_poly

from cagsr.models.sounds import Samples, as_data_url

WIDTH, HEIGHT = 640, 96
ROOM = 700_000
"""Characters of a page that a sound may take; what is longer is played at fewer samples a second."""


def waveform(samples: Samples) -> str:
    """The waveform ``(time,)`` as a data URL of an SVG picture, the loudest sample at its edges: of each column the lowest and the
    highest sample.
    """
    largest = float(np.abs(samples).max()) or 1.0
    columns = np.array_split(samples / largest, min(WIDTH, len(samples)))
    step = WIDTH / len(columns)
    middle = HEIGHT / 2
    tops = [(number * step, middle * (1 - 0.95 * float(one.max()))) for number, one in enumerate(columns)]
    bottoms = [(number * step, middle * (1 - 0.95 * float(one.min()))) for number, one in enumerate(columns)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*tops, *reversed(bottoms)])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'preserveAspectRatio="none"><path d="M0 {middle}H{WIDTH}" stroke="#888" stroke-width=".5"/>'
        f'<polygon points="{points}" fill="#678" stroke="#678" stroke-width=".7"/></svg>'
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"


def playable(samples: Samples, rate: int) -> str:
    """The sound as a data URL, at as many samples a second as there is ``ROOM`` for, ``rate`` halved as often as it takes."""
    halved = 1
    while len(samples) / halved * 2 * 4 / 3 > ROOM:
        halved *= 2
    if halved > 1:
        samples = resample_poly(samples, 1, halved).astype(np.float32)
    return as_data_url(samples, round(rate / halved))
