"""The picture: a heat map of answer tokens by prompt tokens for each answer, with the terms as bars."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cagsr.support.atomic import write_bytes_atomically
from cagsr.view.measure import REWARD, Answer, Measured

MOST_ANSWERS = 4
"""Answers in one picture, the best."""
MOST_LABELS = 60
"""Tokens written out along an axis; longer texts are numbered."""


def draw(measured: Measured) -> Figure:
    """Draw the best ``MOST_ANSWERS`` answers below each other: what they looked at, and their terms."""
    answers = measured.answers[:MOST_ANSWERS]
    width = 5.5 + min(9.0, 1.5 + 0.17 * len(measured.tokens))
    heights = [min(9.0, 2.6 + 0.17 * len(answer.tokens)) for answer in answers]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    axes = figure.subplots(len(answers), 2, squeeze=False, width_ratios=[width - 4, 4], height_ratios=heights)
    for row, answer in enumerate(answers):
        _heat_map(axes[row, 0], measured, answer, row + 1)
        _bars(axes[row, 1], measured, answer, heights[row])
    return figure


def _heat_map(axes: Axes, measured: Measured, answer: Answer, rank: int) -> None:
    attention = answer.planes[REWARD]
    # The first token, where attention parks, would leave all others white.
    shown = attention[:, 1:] if attention.shape[1] > 1 and measured.prompt.words[0] < 0 else attention
    most = float(shown.max()) or 1.0
    image = axes.imshow(attention, aspect="auto", cmap="Blues", vmin=0.0, vmax=most, interpolation="nearest")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="attention", fraction=0.05, pad=0.02)
    _label(axes, "x", measured.tokens, "prompt token")
    _label(axes, "y", answer.tokens, "answer token")
    number = f"{rank}. " if len(measured.answers) > 1 else ""
    axes.set_title(f"{number}reward {answer.reward:+.3g}", loc="left", fontsize=10)


def _label(axes: Axes, which: str, tokens: tuple[str, ...], what: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if len(tokens) > MOST_LABELS:
        axis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_label_text(what, fontsize=8)
        axis.set_tick_params(labelsize=7)
        return
    axis.set_ticks(range(len(tokens)))
    # parse_math: a dollar sign in a text is a dollar sign.
    names = [token.strip().replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") for token in tokens]
    axis.set_ticklabels(names, fontsize=7, rotation=90 if which == "x" else 0, parse_math=False)


def _bars(axes: Axes, measured: Measured, answer: Answer, height: float) -> None:
    names = list(answer.contributions)
    values = list(answer.contributions.values())
    for bar, value in zip(axes.barh(np.arange(len(names)), values, color="#084081", height=0.6), values, strict=True):
        if value < 0:
            bar.set(hatch="////", facecolor="white", edgecolor="#084081")
    raw = {name: f"{value:.4g}" if math.isfinite(value) else "does not apply" for name, value in answer.terms.items()}
    labels = [f"{name.replace('_', ' ')}\n{raw[name]} × {measured.weights[name]:g}" for name in names]
    axes.set_yticks(np.arange(len(names)), labels, fontsize=8)
    # Few terms: bars no thicker than usual, the first on top.
    axes.set_ylim(max(len(names), 2 * height) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_xlim(-1.1 * measured.most, 1.1 * measured.most)
    axes.set_xlabel("contribution", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def save_picture(measured: Measured, path: Path) -> None:
    """Write the picture as PNG, at once; raises RunError where the file can't be written."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A sign that no font has is drawn as a box; that is all there is to say.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        draw(measured).savefig(content, format="png", dpi=130)
    write_bytes_atomically(path, content.getvalue())
