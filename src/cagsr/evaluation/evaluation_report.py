"""An evaluation as tables on a terminal, as Markdown, and as JSON with every prompt's value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cagsr.evaluation.intervals import Interval
from cagsr.evaluation.judged_policies import Evaluated, PolicyComparison
from cagsr.flow import EncodedPrompt

Rows = list[list[str]]


@dataclass(frozen=True)
class EvalReport:
    """All that ``cagsr eval`` found."""

    model: str
    """The model or the file of answers."""
    against: str | None
    """The other one."""
    prompts: tuple[EncodedPrompt, ...]
    mine: tuple[Evaluated, ...]
    theirs: tuple[Evaluated, ...]
    comparisons: tuple[PolicyComparison, ...]
    left_out: tuple[str, ...]
    """What was not measured and why."""
    settings: Mapping[str, Any]
    """What it was run with, for the JSON file."""


def tables(report: EvalReport) -> list[tuple[str, list[str], Rows]]:
    """Title, header and rows of each table: a column for each setting, then a table for each comparison."""
    found = [_means_table(report.model, report.mine)]
    if report.against is not None:
        found.append(_means_table(report.against, report.theirs))
    return found + [_comparison_table(one) for one in report.comparisons]


def headline(report: EvalReport) -> str:
    """What the numbers are means of."""
    answers = sum(len(own) for own in report.mine[0].answers)
    each = f"{answers / len(report.prompts):g} answers each" if answers > len(report.prompts) else "one answer each"
    text = f"{len(report.prompts):,} prompts, {each}; 95 % bootstrap intervals over prompts in brackets."
    if report.comparisons:
        tests = sum(one.p is not None for found in report.comparisons for one in found.differences)
        text += f" Differences are paired by prompt; p: two-sided sign-flip test, corrected for all {tests} tests here (Holm)."
    return text


def print_report(report: EvalReport, console: Console) -> None:
    """Print the tables."""
    console.print(headline(report), highlight=False, markup=False)
    for title, header, rows in tables(report):
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(name, justify="left" if name == header[0] else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def as_markdown(report: EvalReport) -> str:
    """Return the same as a Markdown document."""
    parts = [f"# Evaluation of {report.model}", headline(report)]
    for title, header, rows in tables(report):
        lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
        parts += [f"## {title}", "\n".join(lines)]
    if report.left_out:
        parts.append(f"Left out: {'; '.join(report.left_out)}.")
    return "\n\n".join(parts) + "\n"


def as_tree(report: EvalReport) -> dict[str, Any]:
    """Everything, for the JSON file: means, intervals and the values of every prompt (null where there is none)."""
    return {
        "model": report.model,
        "against": report.against,
        "settings": dict(report.settings),
        "rows": [encoded.prompt.row for encoded in report.prompts],
        "results": [_result(one) for one in report.mine],
        "against_results": [_result(one) for one in report.theirs],
        "comparisons": [_comparison(one) for one in report.comparisons],
        "left_out": list(report.left_out),
    }


def _means_table(title: str, settings: Sequence[Evaluated]) -> tuple[str, list[str], Rows]:
    measures = list(dict.fromkeys(measure for one in settings for measure in one.values))
    rows = [
        [name, *(_cell(one.interval(name)) if name in one.values else "-" for one in settings)] for name in measures
    ]
    of_set = list(dict.fromkeys(measure for one in settings for measure in one.of_set))
    rows += [[name, *(f"{one.of_set[name]:.3f}" for one in settings)] for name in of_set]
    return title, ["measure", *(one.name for one in settings)], rows


def _comparison_table(found: PolicyComparison) -> tuple[str, list[str], Rows]:
    rows = [
        [
            one.measure,
            f"{one.mine.mean:.3f}",
            f"{one.theirs.mean:.3f}",
            f"{one.difference.mean:+.3f} [{one.difference.low:+.3f}, {one.difference.high:+.3f}]",
            "" if one.p_holm is None else _p(one.p_holm),
        ]
        for one in found.differences
    ]
    return found.name, ["measure", "model", "against", "difference", "p"], rows


def _cell(interval: Interval | None) -> str:
    return "-" if interval is None else str(interval)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _result(one: Evaluated) -> dict[str, Any]:
    return {
        "name": one.name,
        "temperature": one.temperature,
        "measures": {
            name: {**_numbers(one.interval(name)), "per_prompt": _finite(values)} for name, values in one.values.items()
        },
        "of_set": dict(one.of_set),
        "answers": [list(own) for own in one.answers],
    }


def _comparison(found: PolicyComparison) -> dict[str, Any]:
    return {
        "name": found.name,
        "model": found.mine,
        "against": found.theirs,
        "measures": {
            one.measure: {
                "model": _numbers(one.mine),
                "against": _numbers(one.theirs),
                "difference": _numbers(one.difference),
                "p": one.p,
                "p_holm": one.p_holm,
                "per_prompt": _finite(one.values),
            }
            for one in found.differences
        },
    }


def _numbers(interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {"mean": None, "low": None, "high": None}
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _finite(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
