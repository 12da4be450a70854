"""The page as text: one HTML file that needs no other file and no network, or the frame of a served one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from typing import Any

from bokeh.embed import json_item
from bokeh.models import BasicTicker, ColumnDataSource, NumeralTickFormatter, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources
from markupsafe import Markup

from cagsr.html_page import fill, page_file, script_digest, script_json, templates
from cagsr.run_page.metric_curves import GROUPS, MORE, curve_data, curves_of
from cagsr.run_page.overview_tables import changed_settings, costs, differing_settings, glance, warnings_of
from cagsr.run_page.read_run import Run
from cagsr.run_page.sample_answers import MOST_CHARACTERS, answers_of

SCRIPTS = ("base.js", "charts.js", "answers.js", "controls.js")
"""The parts of the page's script, in order."""
DASHES = ("solid", "dashed", "dotted", "dashdot", "dotdash")
"""Line styles of the runs, in turn. With the markers they tell runs apart where colours do not."""
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x", "star")
HEIGHT = 180
"""Pixels."""


@dataclass(frozen=True)
class Content:
    """What changes on a page while a run goes on."""

    data: dict[str, Any]
    """What the script draws: curves, answers, states."""
    html: dict[str, str]
    """Id of an element -> its markup, escaped."""


def content_of(runs: Sequence[Run]) -> Content:
    """Collect everything that the page shows of these runs."""
    curves = curves_of(runs)
    points, thinned = curve_data(runs, curves)
    data = {
        "runs": [
            {"label": run.label, "state": run.state.kind, "sentence": run.state.sentence, "written": run.state.written}
            for run in runs
        ],
        "curves": [asdict(one) for one in curves],
        "groups": GROUPS,
        "lazy": MORE,
        "figure": chart(len(runs)),
        "points": points,
        "thinned": thinned,
        "answers": [answers_of(run, MOST_CHARACTERS // len(runs)) for run in runs],
        "dashes": DASHES,
        "markers": MARKERS,
    }
    parts: Any = templates("run_page").get_template("sections.html.jinja").module
    html = {
        "state": parts.state(runs),
        "glance": parts.glance(runs, glance(runs, curves)),
        "warnings": parts.warnings(runs, warnings_of(runs)),
        "costs": parts.costs([(run, costs(run)) for run in runs]),
        "settings": parts.settings(
            runs,
            differing_settings(runs) if len(runs) > 1 else [],
            [(run, changed_settings(run)) for run in runs],
        ),
    }
    return Content(data, {name: str(text) for name, text in html.items()})


def render_page(runs: Sequence[Run], content: Content | None = None, *, live: str = "") -> str:
    """Write the page; ``live`` is the version of one that is served and asks for news, empty for a file.

    Everything that a user or a model wrote is escaped: in the markup by Jinja, in the data as JSON without ``<``, ``>``
    and ``&``. A content security policy forbids every script but the page's own, and connections, unless it is served.
    """
    content = content or content_of(runs)
    parts = "\n".join(page_file("run_page", name) for name in SCRIPTS)
    scripts = [bokeh_script(), f'(async () => {{\n"use strict";\n{parts}}})();']
    return fill(
        "run_page",
        "page.html.jinja",
        title=", ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        runs=runs,
        html={name: Markup(text) for name, text in content.html.items()},
        style=page_file("run_page", "report.css"),
        scripts=[Markup(script) for script in scripts],
        digests=[script_digest(script) for script in scripts],
        data=script_json(content.data),
        live=live,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


@cache
def bokeh_script() -> str:
    """BokehJS's core as text, safe inside a script element; no widgets, no mathematics, no WebGL."""
    script: str = Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0]
    return script


def chart(runs: int) -> dict[str, Any]:
    """A figure with a line for each run, as JSON for ``Bokeh.embed.embed_item``, which makes a document of its own each time.

    Its data sources are named ``line0``, ``dots0`` and ``marks0`` for the first run and so on. Colours are set on the page,
    which knows whether it is light or dark.
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
        smooth = {"line_width": 2, "line_dash": dash, "name": f"smooth{number}", "visible": False}
        plot.line("step", "smooth", source=line, **smooth)
        plot.scatter("step", "value", source=dots, size=6, marker=MARKERS[number % len(MARKERS)], name=f"dot{number}")
    plot.xgrid.grid_line_color = None
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=6, min_interval=1)
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=4)
    plot.axis.major_label_text_font = "system-ui, sans-serif"
    plot.axis.major_label_text_font_size = "11px"
    plot.axis.minor_tick_line_color = None
    plot.axis.major_tick_out = 3
    plot.axis.major_tick_in = 0
    return dict(json_item(plot))
