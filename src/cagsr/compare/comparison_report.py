"""The report of a comparison: Markdown with its pictures beside it, and one HTML file; ``report.jinja`` says it for both."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from cagsr.compare import result_figures as figures
from cagsr.compare import result_tables as tables
from cagsr.compare.jobs import GREEDY, MATCHED, SAMPLED
from cagsr.compare.plan import START
from cagsr.compare.results import Results
from cagsr.compare.scheduler import Failure
from cagsr.errors import RunError
from cagsr.html_page import fill, templates
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import working


def finding(results: Results) -> str:
    """What it comes to, in one sentence: the gain of the method whose settings the plan is about, in its first measure."""
    name = results.plan.settings_method
    label = results.plan.label(name)
    measure = next((one for one in results.plan.primary if one in results.measures), "")
    for how in (MATCHED, GREEDY, SAMPLED):
        if (test := tables.paired_test(results, name, how, measure)) is not None:
            return f"{label}: {measure} {test[0]}, {tables.GAINS[how]}."
    return f"{label} is not judged yet."


@working("writing the report")
def write_report(results: Results, command: str, failures: Sequence[Failure], path: Path) -> tuple[Path, Path]:
    """Write the report as ``path`` (Markdown), its pictures into a folder of that name, and all in one as ``.html``.

    Returns the Markdown and the HTML file; raises RunError where nothing is done yet.
    """
    if not results.seeds(START) or len(results.methods) < 2:
        raise RunError(f"{results.plan.folder}: no method is judged yet, so there is nothing to report.")
    content = _content(results) | {"command": command, "failures": failures}
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in content["pictures"].items():
        write_text_atomically(folder / f"{name}.svg", picture["svg"])
    content["folder"] = os.path.relpath(folder, path.parent)
    page = path.with_suffix(".html")
    write_text_atomically(path, re.sub(r"\n{3,}", "\n\n", _render("markdown", content)).rstrip() + "\n")
    write_text_atomically(page, _render("html", content))
    return path, page


def _content(results: Results) -> dict[str, Any]:
    """What the template is filled with."""
    plan = results.plan
    primary = [measure for measure in plan.primary if measure in results.measures]
    groups = {
        group: [name for name in results.methods if name != START and plan.methods[name].group == group]
        for group in ("main", "labels", "ablation", "control")
    }
    main = [*groups["main"], *groups["control"]]
    labels = tables.label_table(results, primary[0]) if primary else None
    drawn = {
        f"gains-{measure}": (f"Difference in {measure} from the start", figures.gains_figure(results, main, measure))
        for measure in primary
    }
    if labels is not None:
        drawn["labels"] = ("Quality against human labels", figures.label_figure(results, primary[0]))
    drawn["training"] = ("Curves over training, mean over seeds", figures.training_figure(results, main[:7]))
    over = figures.over_optimisation_figure(results, main[:7])
    drawn["over-optimisation"] = ("Reward against held-out quality", over)
    by_seeds: dict[int, list[str]] = {}
    for name in results.methods:
        by_seeds.setdefault(len(results.seeds(name)), []).append(plan.label(name))
    counts = {name: (len(results.seeds(name)), len(plan.seeds_of(name))) for name in plan.methods}
    first = results.seeds(START)[0]
    return {
        "results": results,
        "plan": plan,
        "tables": tables,
        "primary": primary,
        "groups": groups,
        "main": main,
        "labels": labels,
        "pictures": {name: {"title": title, "svg": svg} for name, (title, svg) in drawn.items() if svg is not None},
        "by_seeds": sorted(by_seeds.items(), reverse=True),
        "validity": next(iter(results.validity()), None),
        "start": results.raw(START, first) | {"seed": first},
        "few": [plan.label(name) for name in results.methods if len(results.seeds(name)) < 3],
        "unfinished": [
            f"{plan.label(name)} ({done} of {all_})" for name, (done, all_) in counts.items() if done < all_
        ],
    }


def _render(kind: str, content: dict[str, Any]) -> str:
    """Fill ``report.jinja`` with the macros of a format, ``markdown`` or ``html``."""
    environment = templates("compare", html=kind == "html")
    markdown = MarkdownIt("commonmark", {"html": False})
    environment.filters |= {
        "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
        # Emphasis, code, links; HTML in the text stays text. What a template has escaped is text again first.
        "inline": lambda text: Markup(markdown.renderInline(Markup(text).unescape())),
        "line": lambda text: " ".join(text.split()),
    }
    return fill("compare", f"{kind}.jinja", escaped=kind == "html", **content)
