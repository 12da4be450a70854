"""Checkers for reasoning and code: for ``evaluation.metric`` a number, for ``--checker`` named numbers, of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cagsr.flow import Prompt
from cagsr.sandbox.run import SandboxConfig
from cagsr.tasks.arithmetic import equations
from cagsr.tasks.code import run_answers
from cagsr.tasks.final_answer import is_right


def correct(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Whether each answer ends at what the row's ``answer`` ends at (a bare result, or a worked solution): 1 or 0."""
    return [float(is_right(text, own)) for text, own in zip(completions, answer, strict=True)]


def reasoning(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **columns: Any
) -> list[dict[str, float | None]]:
    """``correct``, ``equations`` (how many there are) and ``valid_equations`` (the share that holds; None without one)."""
    found: list[dict[str, float | None]] = []
    for text, right in zip(completions, correct(prompts, completions, answer=answer), strict=True):
        held = equations(text)
        share = sum(held) / len(held) if held else None
        found.append({"correct": right, "equations": float(len(held)), "valid_equations": share})
    return found


def passed(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Whether each answer's program passes the row's tests, in the sandbox: 1 or 0 (also where a row has none)."""
    return [float(one["passed"] or 0.0) for one in code(prompts, completions, **columns)]


def code(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[dict[str, float | None]]:
    """``passed``, ``timed_out`` and ``compiles`` of each answer's program; None where the row has no tests.

    ``prompts`` are texts, so a program is taken from an answer as one to a plain prompt is, unless it is between fences.
    """
    rows = [
        Prompt(number, text, columns={name: values[number - 1] for name, values in columns.items()})
        for number, text in enumerate(prompts, start=1)
    ]
    outcomes = run_answers(rows, completions, SandboxConfig())
    return [
        {"passed": None, "timed_out": None, "compiles": None}
        if one is None
        else {
            "passed": float(one.kind == "passed"),
            "timed_out": float(one.kind == "timed out"),
            "compiles": float("SyntaxError" not in one.output and "IndentationError" not in one.output),
        }
        for one in outcomes
    ]
