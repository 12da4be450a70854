"""The page as text: one HTML file that needs no other file and no network, or the frame of a served one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from cagsr.html_page import page_file, script_digest, script_json, templates
from cagsr.run_page.bokeh_chart import DASHES, MARKERS, bokeh_script, chart
from cagsr.run_page.metric_curves import GROUPS, MORE, curve_data, curves_of
from cagsr.run_page.overview_tables import changed_settings, costs, differing_settings, glance, warnings_of
from cagsr.run_page.read_run import Run
from cagsr.run_page.sample_answers import MOST_CHARACTERS, answers_of

SCRIPTS = ("base.js", "charts.js", "answers.js", "controls.js")
"""The parts of the page's script, in order."""


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
    """Write the page.

    Everything that a user or a model wrote is escaped: in the markup by Jinja, in the data as JSON without ``<``, ``>``
    and ``&``. A content security policy forbids every script but the page's own, and connections, unless it is served.

    Args:
        runs: what it shows.
        content: what ``content_of`` gave for them, None to collect it now.
        live: the version of a page that is served and asks for news; empty for a file.
    """
    content = content or content_of(runs)
    parts = "\n".join(page_file("run_page", name) for name in SCRIPTS)
    scripts = [bokeh_script(), f'(async () => {{\n"use strict";\n{parts}}})();']
    page: str = (
        templates("run_page")
        .get_template("page.html.jinja")
        .render(
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
    )
    return page
