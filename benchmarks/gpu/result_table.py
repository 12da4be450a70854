"""The results as Markdown, for ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.parts import Result


def markdown(machine: Mapping[str, Any], notes: Sequence[str], results: Sequence[Result]) -> str:
    """A table of all that was measured; what was not is named with its reason."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    lines += ["| part | measured | figures |", "| --- | --- | --- |"]
    for result in results:
        rows = [(row["measured"], ", ".join(f"{name} {_said(value)}" for name, value in row["figures"].items()))
                for row in result.rows]  # fmt: skip
        if result.state != "finished":
            rows.append((f"**{result.state}**", result.reason))
        rows = rows or [("nothing", "")]
        lines += [
            f"| {_cell(result.title) if number == 0 else ''} | {_cell(measured)} | {_cell(figures)} |"
            for number, (measured, figures) in enumerate(rows)
        ]
    return "\n".join(lines) + "\n"


def _said(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
