"""What each term of the reward sees of the truth, on several models: the table of docs/signals.md.

    python -m examples.e2e.terms --ranked gemma=ranked.jsonl,ranked_entropy.jsonl llama=other.jsonl --markdown terms.md

A file is what ``cagsr rank`` wrote of E2E prompts with all terms (``examples/e2e/terms.yaml``). A further file of a model holds the
same answers under other settings: terms whose values it changes are added under the file's name. All correlations are within the
answers to one prompt; the published slot patterns say which facts are said, added and wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from cagsr.diagnosis.cross_fit import Products, held_fixed
from cagsr.errors import CagsrError, DataError
from cagsr.evaluation.intervals import Interval, draw_counts
from cagsr.support.atomic import write_text_atomically
from examples.e2e.signal_formulas import Floats
from examples.e2e.signal_table import (
    correlation_of,
    correlation_parts,
    crossed_interval,
    share_of,
    share_parts,
    share_text,
    signed_text,
)
from examples.e2e.slots import check

COLUMNS = ("facts said", "length fixed", "added", "wrong", "length", "of the oracle's gain")


@dataclass(frozen=True)
class Options:
    """Set terms against the truth."""

    ranked: list[str]
    """NAME=FILE[,FILE...] of each model."""
    markdown: Path | None = None
    """The tables."""


@dataclass(frozen=True)
class Ranked:
    """The answers of a model, all arrays ``(prompts, candidates)``."""

    completions: tuple[tuple[str, ...], ...]
    terms: Mapping[str, Floats]
    said: Floats
    """Share of a prompt's facts."""
    added: Floats
    """Facts over the prompt's facts."""
    wrong: Floats
    """The same."""
    length: Floats
    """Tokens."""


def read_ranked(path: Path) -> Ranked:
    """Read what ``cagsr rank`` wrote, the answers in the order of their texts; raises DataError for another file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = [sorted(row["candidates"], key=lambda one: (one["completion"], one["tokens"])) for row in rows]
        names = list(answers[0][0]["terms"])
        terms = {name: np.array([[one["terms"][name] for one in own] for own in answers], float) for name in names}
        length = np.array([[one["tokens"] for one in own] for own in answers], float)
        completions = tuple(tuple(str(one["completion"]) for one in own) for own in answers)
        prompts = [str(row["prompt"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not what cagsr rank writes, with as many answers to each prompt ({error!r}); give such a file."
        ) from error
    reports = [[check(prompt, text) for text in own] for prompt, own in zip(prompts, completions, strict=True)]
    facts = np.array([[one.facts for one in own] for own in reports], float)
    said = np.array([[one.hits for one in own] for own in reports], float)
    added, wrong = (
        np.array([[len(getattr(one, name)) for one in own] for own in reports]) for name in ("added", "wrong")
    )
    return Ranked(completions, terms, said, added / facts, wrong / facts, length)


def signals_of(files: list[Path]) -> tuple[dict[str, Floats], Ranked]:
    """The terms of a model's files by name, and its answers with what is true of them; those that never vary are left out."""
    first = read_ranked(files[0])
    found = dict(first.terms)
    for file in files[1:]:
        other = read_ranked(file)
        if other.completions != first.completions:
            raise DataError(f"{file}: other answers than {files[0]}; rank with the same --seed, prompts and model.")
        for name, values in other.terms.items():
            if name not in first.terms or not np.allclose(values, first.terms[name], equal_nan=True):
                found[f"{name} ({file.stem})"] = values
    usable = {name: without_gaps(one) for name, one in found.items()}
    return {**{name: one for name, one in usable.items() if np.ptp(one, axis=1).any()}, "length": first.length}, first


def without_gaps(values: Floats) -> Floats:
    """Where a term does not apply (NaN), the mean of the prompt's other answers: there it pays nothing, either way."""
    known = np.isfinite(values)
    mean = np.where(known, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    return np.where(known, values, mean)


def length_fixed(values: Floats, truth: Ranked) -> Interval:
    """Correlation with the facts said, length held fixed, with its interval over prompts."""
    products = Products.of([values], truth.said, truth.length)
    prompts = len(truth.said)
    draws = draw_counts(prompts, 2000).astype(np.float64)
    return Interval.of(
        held_fixed(values, truth.said, truth.length), products.correlations(draws, hold_length=True)[:, 0]
    )


def row_of(values: Floats, truth: Ranked) -> dict[str, Interval]:
    """The columns of a signal, with intervals over prompts."""

    def interval(parts: Floats, ratio: Callable[[Floats], Floats]) -> Interval:
        return crossed_interval(parts[None], ratio)[0]

    def with_(other: Floats) -> Interval:
        return interval(correlation_parts(values, other), correlation_of)

    return {
        "facts said": with_(truth.said),
        "length fixed": length_fixed(values, truth),
        "added": with_(truth.added),
        "wrong": with_(truth.wrong),
        "length": with_(truth.length),
        "of the oracle's gain": interval(share_parts(values, truth.said), share_of),
    }


def table_of(name: str, files: list[Path]) -> str:
    """The table of a model, in Markdown."""
    signals, truth = signals_of(files)
    prompts, candidates = truth.said.shape
    best = truth.said.max(axis=1).mean()
    lines = [
        f"**{name}**: {prompts} prompts, {candidates} answers each; facts said {truth.said.mean():.3f}, best of {candidates} by an "
        f"oracle {best:.3f}; added {truth.added.mean():.3f} and wrong {truth.wrong.mean():.3f} per fact asked for.",
        "",
        f"| term | {' | '.join(COLUMNS)} |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    for term, values in signals.items():
        row = row_of(values, truth)
        cells = [share_text(row[column]) if column == COLUMNS[-1] else signed_text(row[column]) for column in COLUMNS]
        lines.append(f"| {term} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Write the table of each model."""
    tables = []
    for one in options.ranked:
        name, _, files = one.partition("=")
        if not files:
            raise DataError(f"--ranked {one}: write it as NAME=FILE or NAME=FILE,FILE.")
        tables.append(table_of(name, [Path(file) for file in files.split(",")]))
    text = "\n\n".join(tables)
    print(text)
    if options.markdown is not None:
        write_text_atomically(options.markdown, text + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except CagsrError as error:
        sys.exit(str(error))
