"""The report of a comparison: one Markdown file with its pictures beside it, and one self-contained HTML file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from cagsr.atomic import write_text_atomically
from cagsr.compare import result_figures as figures
from cagsr.compare import result_tables as tables
from cagsr.compare.plan import START
from cagsr.compare.result_tables import Table
from cagsr.compare.results import GREEDY, MATCHED, SAMPLED, Results
from cagsr.compare.scheduler import Failure
from cagsr.errors import RunError
from cagsr.progress import working

TEXT_SHOWN = 3
"""Prompts whose answers by the main methods are printed."""


@dataclass(frozen=True)
class Picture:
    """A plot as SVG text."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    examples: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = field(default=())
    """(prompt, ((label, text), ...)) blocks."""


def finding(results: Results) -> str:
    """What it comes to, in one sentence: the gain of the method whose settings the plan is about, in its first measure."""
    name = results.plan.settings_method
    measure = next((one for one in results.plan.primary if one in results.measures), None)
    how = next(
        (one for one in (MATCHED, GREEDY, SAMPLED) if measure is not None and results.can_gain(name, one, measure)),
        None,
    )
    if measure is None or how is None:
        return f"{results.plan.label(name)} is not judged yet."
    [test] = [one for one in tables.gain_tests(results, [name], [measure]) if one.how == how]
    return f"{results.plan.label(name)}: {measure} {test.difference}, {tables.GAINS[how]}."


@working("writing the report")
def write_report(results: Results, command: str, failures: Sequence[Failure], path: Path) -> tuple[Path, Path]:
    """Write the report as ``path`` (Markdown), its pictures into a folder of that name, and all in one as ``.html``.

    Args:
        results: what is done.
        command: the command that makes it, printed at its top.
        failures: jobs that failed, named in it.
        path: Markdown file.

    Returns:
        The Markdown and the HTML file.

    Raises:
        RunError: nothing is done yet.
    """
    if not results.seeds(START) or len(results.methods) < 2:
        raise RunError(f"{results.plan.folder}: no method is judged yet, so there is nothing to report.")
    sections = compose(results, command, failures)
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            write_text_atomically(pictures / f"{picture.name}.svg", picture.svg)
    write_text_atomically(path, as_markdown(results.plan.title, sections, os.path.relpath(pictures, path.parent)))
    page = path.with_suffix(".html")
    write_text_atomically(page, as_html(results.plan.title, sections))
    return path, page


def compose(results: Results, command: str, failures: Sequence[Failure]) -> list[Section]:
    """Analyse the results into the sections of the report."""
    plan = results.plan
    primary = [measure for measure in plan.primary if measure in results.measures]
    groups = {
        group: [name for name in results.methods if name != START and plan.methods[name].group == group]
        for group in ("main", "labels", "ablation", "control")
    }
    main = [*groups["main"], *groups["control"]]
    sections = [_what_was_run(results, command, failures)]
    if plan.findings:
        sections.append(Section("Findings", tuple(plan.findings.strip().split("\n\n"))))
    pictures = _pictures(
        *(
            (
                f"gains-{measure}",
                f"Difference in {measure} from the start",
                figures.gains_figure(results, main, measure),
            )
            for measure in primary
        )
    )
    contrasts = tables.contrasts(results, primary)
    sections.append(
        Section(
            "The methods",
            (
                "A peaked policy looks better when sampled at temperature 1 for that reason alone. The column to read is the start "
                "at *matched entropy* (sampled at the temperature at which it is as peaked as the trained policy), or greedy "
                "against greedy.",
            ),
            (
                *tables.gains(results, main, primary, "Gains"),
                *_given(contrasts),
                *_given(tables.win_rates(results, main)),
            ),
            pictures,
        )
    )
    sections.append(Section("All measures", (), (tables.levels(results, [START, *main]),)))
    labels = tables.label_table(results, primary[0]) if primary else None
    if labels is not None:
        picture = _pictures(("labels", "Quality against human labels", figures.label_figure(results, primary[0])))
        accuracy = _given(tables.reward_models(results))
        sections.append(
            Section(
                "How many labels does the self-reward save?",
                ("Reward models are trained on nested subsets of the same human pairs, from each seed's own start.",),
                (labels, *accuracy, *tables.gains(results, groups["labels"], primary, "Runs with labels")),
                picture,
            )
        )
    if groups["ablation"]:
        sections.append(
            Section(
                "Ablations",
                (f"Each changes one thing of {plan.label(plan.base)}, which is repeated as the first row.",),
                (
                    *tables.gains(results, [plan.base, *groups["ablation"]], primary, "Ablations"),
                    *tables.against(
                        results, groups["ablation"], plan.base, primary, f"Ablations against {plan.label(plan.base)}"
                    ),
                ),
            )
        )
    sections += _validity(results)
    sections.append(
        Section(
            "Over training",
            ("Where the reward goes on rising while the held-out metric falls, the reward is being gamed.",),
            (),
            _pictures(
                ("training", "Curves over training, mean over seeds", figures.training_figure(results, main[:7])),
                (
                    "over-optimisation",
                    "Reward against held-out quality",
                    figures.over_optimisation_figure(results, main[:7]),
                ),
            ),
        )
    )
    sections.append(_examples(results, main[:5]))
    sections.append(Section("Costs", (), (tables.costs(results, results.methods),)))
    sections.append(
        Section("What the numbers do not show", tuple(f"- {limit}" for limit in _limits(results, primary, failures)))
    )
    return sections


def _what_was_run(results: Results, command: str, failures: Sequence[Failure]) -> Section:
    plan = results.plan
    counts: dict[int, list[str]] = {}
    for name in results.methods:
        counts.setdefault(len(results.seeds(name)), []).append(plan.label(name))
    seeds = "; ".join(
        f"{count} {'seed' if count == 1 else 'seeds'}: {', '.join(names)}"
        for count, names in sorted(counts.items(), reverse=True)
    )
    prompts = len(results.raw(START, results.seeds(START)[0])["prompts"])
    lines = [
        f"Made by `{command}`.",
        f"All methods go through the same loop from the same supervised starts and are judged on the same {prompts:,} test "
        f"prompts, none of which any of them was trained on. {seeds[0].upper() + seeds[1:]}.",
    ]
    if failures:
        lines.append("Not there, because they failed: " + ", ".join(failure.job.name for failure in failures) + ".")
    return Section("What was run", tuple(lines))


def _validity(results: Results) -> list[Section]:
    table = tables.validity(results)
    if table is None:
        return []
    found = results.validity()[0]
    truth = found["truths"][0]
    examples = tuple(
        (
            one["prompt"],
            (
                (
                    f"preferred (reward {one['preferred_reward']:+.1f} sd, {truth} {one['preferred_truth']:.2f})",
                    one["preferred"],
                ),
                (
                    f"but better (reward {one['better_reward']:+.1f} sd, {truth} {one['better_truth']:.2f})",
                    one["better"],
                ),
            ),
        )
        for one in found["disagreements"]
    )
    learned = "; ".join(
        f"`{row['prompt']}` → " + ", ".join(f"{word} ({strength:.2f})" for word, strength in row["answer"])
        for row in found["associations"]
    )
    sections = [Section("Does the reward see the truth?", (), (table,))]
    if learned:
        sections.append(
            Section(
                "What goes with what",
                (f"The strongest associations of seed {found['seed']} beyond the word itself: {learned}.",),
            )
        )
    if examples:
        sections.append(
            Section(
                "Where the reward is wrong",
                (
                    f"The worst disagreements between the reward and {truth}: one pair of answers a prompt, worst first.",
                ),
                examples=examples,
            )
        )
    return sections


def _examples(results: Results, methods: Sequence[str]) -> Section:
    start = results.raw(START, results.seeds(START)[0])
    seed = results.seeds(START)[0]
    blocks = []
    for number in range(min(TEXT_SHOWN, len(start["prompts"]))):
        answers = [(f"{results.plan.label(START)}, greedy", start["texts"]["greedy"][number])]
        for name in methods:
            if seed in results.seeds(name) and "greedy" in results.raw(name, seed)["texts"]:
                answers.append(
                    (f"{results.plan.label(name)}, greedy", results.raw(name, seed)["texts"]["greedy"][number])
                )
        blocks.append((start["prompts"][number], tuple(answers)))
    return Section("Answers", (f"The first test prompts, seed {seed}; not chosen.",), examples=tuple(blocks))


def _limits(results: Results, primary: Sequence[str], failures: Sequence[Failure]) -> list[str]:
    """What the plan's author says, and what the results themselves show to be thin."""
    plan = results.plan
    found = list(plan.limits)
    few = [plan.label(name) for name in results.methods if len(results.seeds(name)) < 3]
    if few:
        found.append(f"Fewer than three seeds: {', '.join(few)}. Their intervals hold prompts, hardly seeds.")
    missing = [
        f"{plan.label(name)} ({len(results.seeds(name))} of {len(plan.seeds_of(name))})"
        for name in plan.methods
        if len(results.seeds(name)) < len(plan.seeds_of(name))
    ]
    if missing:
        found.append(f"Not finished: {', '.join(missing)}. The command goes on from there.")
    absent = [measure for measure in plan.primary if measure not in results.measures]
    if absent:
        found.append(f"Not measured: {', '.join(absent)}.")
    if plan.judges.embedding_model is None:
        found.append("No embedding model judged relevance: the lexical measure counts words only.")
    return found


def _pictures(*drawn: tuple[str, str, str | None]) -> tuple[Picture, ...]:
    return tuple(Picture(name, title, svg) for name, title, svg in drawn if svg is not None)


def _given(table: Table | None) -> tuple[Table, ...]:
    return () if table is None else (table,)


def as_markdown(title: str, sections: Sequence[Section], pictures: str) -> str:
    """Write the report as Markdown; ``pictures`` is the folder of the SVG files as seen from it."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph] if paragraph.startswith("- ") else [paragraph, ""]
        if section.paragraphs and section.paragraphs[-1].startswith("- "):
            lines.append("")
        for picture in section.pictures:
            lines += [f"![{picture.title}]({pictures}/{picture.name}.svg)", ""]
        for table in section.tables:
            lines += [f"**{table.title}.** {table.note}".strip(), ""]
            lines.append("| " + " | ".join(table.header) + " |")
            lines.append("| " + " | ".join("---" for _ in table.header) + " |")
            lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
            lines.append("")
        for prompt, answers in section.examples:
            lines += [f"> {_line(prompt)}", ""]
            lines += [f"- {label}: {_line(text)}" for label, text in answers]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """Write the report as one page that needs no other file and no network."""
    template = files("cagsr.compare").joinpath("comparison.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = _inline
    page: str = environment.from_string(template).render(title=title, sections=sections, anchor=_anchor)
    return page


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _inline(text: str) -> Markup:
    """Markdown within a line (emphasis, code, links) as HTML; HTML in the text stays text."""
    return Markup(MarkdownIt("commonmark", {"html": False}).renderInline(text))
