"""The chart as a Bokeh figure without data: the page's script makes one for each curve and fills it, also with news."""

from __future__ import annotations

from functools import cache
from typing import Any

from bokeh.embed import json_item
from bokeh.models import BasicTicker, ColumnDataSource, NumeralTickFormatter, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources

DASHES = ("solid", "dashed", "dotted", "dashdot", "dotdash")
"""Line styles of the runs, in turn. With the markers they tell runs apart where colours do not."""
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x", "star")
HEIGHT = 180
"""Pixels."""


@cache
def bokeh_script() -> str:
    """BokehJS's core as text, safe inside a script element; no widgets, no mathematics, no WebGL."""
    script: str = Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0]
    return script


def chart(runs: int) -> dict[str, Any]:
    """A figure with a line for each run, as JSON for ``Bokeh.embed.embed_item``, which makes a document of its own each time.

    Its data sources are named ``line0``, ``dots0`` and ``marks0`` for the first run and so on. Colours are set on the page,
    which knows whether it is light or dark.

    Args:
        runs: how many lines.
    """
    plot: Any = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        x_range=Range1d(start=0, end=1),
        y_range=Range1d(start=0, end=1),
        min_border_left=46,
        min_border_right=10,
        min_border_top=6,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        output_backend="canvas",
    )
    for number in range(runs):
        marks = ColumnDataSource({"step": []}, name=f"marks{number}")
        plot.vspan(x="step", source=marks, line_dash=[2, 3], line_width=1.5, name=f"mark{number}")
    for number in range(runs):
        dash = DASHES[number % len(DASHES)]
        line = ColumnDataSource({"step": [], "value": [], "smooth": []}, name=f"line{number}")
        dots = ColumnDataSource({"step": [], "value": []}, name=f"dots{number}")
        plot.line("step", "value", source=line, line_width=1.8, line_dash=dash, name=f"raw{number}")
        smooth = plot.line("step", "smooth", source=line, line_width=2, line_dash=dash, name=f"smooth{number}")
        smooth.visible = False
        plot.scatter("step", "value", source=dots, size=6, marker=MARKERS[number % len(MARKERS)], name=f"dot{number}")
    plot.xgrid.grid_line_color = None
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=6, min_interval=1)
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=4)
    for axis in (plot.xaxis, plot.yaxis):
        axis.major_label_text_font = "system-ui, sans-serif"
        axis.major_label_text_font_size = "11px"
        axis.minor_tick_line_color = None
        axis.major_tick_out = 3
        axis.major_tick_in = 0
    return dict(json_item(plot))
