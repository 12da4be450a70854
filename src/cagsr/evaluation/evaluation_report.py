"""An evaluation as tables on a terminal, as Markdown, and as JSON with every prompt's value."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from cagsr.evaluation.judged_policies import Evaluated, PolicyComparison
from cagsr.flow import EncodedPrompt
from cagsr.support.tables import markdown_table, plain, rich_table

Titled = tuple[str, list[str], list[list[str]]]
"""Title, header and rows of a table."""


@dataclass(frozen=True)
class EvalReport:
    """All that ``cagsr eval`` found."""

    model: str
    """The model or the file of answers."""
    against: str | None
    """The other one."""
    prompts: Sequence[EncodedPrompt]
    mine: Sequence[Evaluated]
    theirs: Sequence[Evaluated]
    comparisons: Sequence[PolicyComparison]
    left_out: Sequence[str]
    """What was not measured and why."""
    settings: Mapping[str, Any]
    """What it was run with, for the JSON file."""


def tables(report: EvalReport) -> list[Titled]:
    """A column for each setting of the model, of the other one, then a table for each comparison."""
    found = [_means_table(report.model, report.mine)]
    if report.against is not None:
        found.append(_means_table(report.against, report.theirs))
    return found + [_comparison_table(one) for one in report.comparisons]


def headline(report: EvalReport) -> str:
    """What the numbers are means of."""
    answers = sum(map(len, report.mine[0].answers))
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
        table = rich_table(title, header, rows, no_wrap=True)
        table.title_justify = "left"
        console.print(table)


def as_markdown(report: EvalReport) -> str:
    """Return the same as a Markdown document."""
    parts = [f"# Evaluation of {report.model}", headline(report)]
    for title, header, rows in tables(report):
        parts += [f"## {title}", markdown_table(header, rows)]
    if report.left_out:
        parts.append(f"Left out: {'; '.join(report.left_out)}.")
    return "\n\n".join(parts) + "\n"


def as_tree(report: EvalReport) -> dict[str, Any]:
    """Everything, for the JSON file: means, intervals and the values of every prompt (null where there is none)."""
    tree = {
        "model": report.model,
        "against": report.against,
        "settings": report.settings,
        "rows": [encoded.prompt.row for encoded in report.prompts],
        "results": [_result(one) for one in report.mine],
        "against_results": [_result(one) for one in report.theirs],
        "comparisons": [_comparison(one) for one in report.comparisons],
        "left_out": report.left_out,
    }
    return plain(tree)


def _means_table(title: str, settings: Sequence[Evaluated]) -> Titled:
    measures = list(dict.fromkeys(measure for one in settings for measure in one.values))
    rows = [[name, *(f"{one.interval(name) or '-'}" for one in settings)] for name in measures]
    of_set = list(dict.fromkeys(measure for one in settings for measure in one.of_set))
    rows += [[name, *(f"{one.of_set[name]:.3f}" for one in settings)] for name in of_set]
    return title, ["measure", *(one.name for one in settings)], rows


def _comparison_table(found: PolicyComparison) -> Titled:
    rows = []
    for one in found.differences:
        p = "" if one.p_holm is None else "<0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"
        rows.append([one.measure, f"{one.mine.mean:.3f}", f"{one.theirs.mean:.3f}", f"{one.difference:+.3f}", p])
    return found.name, ["measure", "model", "against", "difference", "p"], rows


def _result(one: Evaluated) -> dict[str, Any]:
    unknown = {"mean": None, "low": None, "high": None}
    measures = {}
    for name, values in one.values.items():
        interval = one.interval(name)
        measures[name] = {**(unknown if interval is None else asdict(interval)), "per_prompt": values}
    settings = {"name": one.name, "temperature": one.temperature, "measures": measures}
    return {**settings, "of_set": one.of_set, "answers": one.answers}


def _comparison(found: PolicyComparison) -> dict[str, Any]:
    measures = {
        one.measure: {
            "model": asdict(one.mine),
            "against": asdict(one.theirs),
            "difference": asdict(one.difference),
            "p": one.p,
            "p_holm": one.p_holm,
            "per_prompt": one.values,
        }
        for one in found.differences
    }
    return {"name": found.name, "model": found.mine, "against": found.theirs, "measures": measures}
