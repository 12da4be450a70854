"""The tables of a report: levels, gains with intervals and corrected tests, contrasts, labels, ablations, validity, costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from cagsr.compare.jobs import GREEDY, MATCHED, SAMPLED
from cagsr.compare.plan import START
from cagsr.compare.results import Results
from cagsr.evaluation.intervals import Interval, holm, mean_interval, paired_difference, paired_p_value
from cagsr.evaluation.intervals import win_rates as prompt_win_rates

GAINS = {
    SAMPLED: "sampled, against the start sampled alike",
    MATCHED: "sampled, against the start at matched entropy",
    GREEDY: "greedy, against the start greedy",
}
HOWS = {GREEDY: "greedy", MATCHED: "gain at matched entropy", SAMPLED: "sampled"}
LOWER = ("missed", "added", "wrong", "perplexity", "follow_up_perplexity", "repetition", "self_bleu")
TEXTS = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
_Key = TypeVar("_Key")
WIN_RATE = "reward_model"
"""The measure of an unseen reward model, which becomes a win rate."""


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def _table(kind: str, rows: Sequence[tuple[str, ...]], columns: Iterable[str] = (), **names: object) -> Table | None:
    """A table with its texts of ``tables.yaml`` and more columns; None where it has no rows."""
    texts = TEXTS[kind]
    title, note = (texts[part].format(**names) for part in ("title", "note"))
    return Table(title, (*texts["header"], *columns), tuple(rows), note) if rows else None


def levels(results: Results, methods: Sequence[str]) -> Table | None:
    """Mean of every measure, for each method and decoding."""
    measures = results.measures
    rows = []
    for name in methods:
        for how in (SAMPLED, GREEDY):
            values = [results.values(name, how, measure) for measure in measures]
            if values[0] is not None:
                cells = ("" if one is None else f"{np.nanmean(one):.3f}" for one in values)
                rows.append((results.plan.label(name), str(len(results.seeds(name))), how, *cells))
    return _table("levels", rows, measures)


def paired_test(
    results: Results, method: str, how: str, measure: str, against: str = START
) -> tuple[Interval, float] | None:
    """A method against another in one way and measure: difference, p before correction; None where it was not measured so."""
    pair = results.pair(method, how, measure, against)
    return None if pair is None else (paired_difference(*pair), paired_p_value(*pair))


def differences(
    results: Results, methods: Sequence[str], measures: Sequence[str], title: str, against: str = START
) -> list[Table]:
    """One table a measure: each method's difference from its start, or ``against``, with stars after Holm over all tables."""
    columns = GAINS if against == START else {how: HOWS[how] for how in GAINS}
    keys = [(name, how, measure) for measure in measures for name in methods for how in columns]
    cells = starred({key: test for key in keys if (test := paired_test(results, *key, against)) is not None})
    tables = []
    for measure in measures:
        rows = []
        for name in methods:
            own = [cells.get((name, how, measure), "") for how in columns]
            if any(own):
                seeds = set(results.seeds(name)) & set(results.seeds(against))
                rows.append((results.plan.label(name), str(len(seeds)), *own))
        better = "less" if measure in (*LOWER, *results.plan.lower_is_better) else "more"
        names = {"title": title, "measure": measure, "better": better, "against": results.plan.label(against)}
        kind = "gains" if against == START else "against"
        tables.append(_table(kind, rows, columns.values(), tests=len(cells), **names))
    return [table for table in tables if table is not None]


def starred(tests: Mapping[_Key, tuple[Interval, float]]) -> dict[_Key, str]:
    """Each difference as text, with a star where it holds after Holm's correction over all of them."""
    corrected = holm([p for _, p in tests.values()])
    rows = zip(tests.items(), corrected, strict=True)
    return {key: f"{difference}{'*' if p < 0.05 else ''}" for (key, (difference, _)), p in rows}


def contrasts(results: Results, measures: Sequence[str]) -> Table | None:
    """Methods against each other: greedy, sampled, and by their gains over their starts at matched entropy."""
    found: dict[tuple[str, ...], tuple[Interval, float]] = {}
    for first, second in results.plan.contrasts:
        seeds = set(results.seeds(first)) & set(results.seeds(second))
        for measure in measures:
            for how, said in HOWS.items():
                if (test := paired_test(results, first, how, measure, second)) is not None:
                    labels = (results.plan.label(name) for name in (first, second))
                    found[*labels, str(len(seeds)), measure, said] = test
    return _table("contrasts", [(*row, cell) for row, cell in starred(found).items()])


def win_rates(results: Results, methods: Sequence[str]) -> Table | None:
    """How often the unseen reward model prefers a method's answer to its start's, decoded alike."""
    rows = []
    for name in methods:
        pairs = [results.pair(name, how, WIN_RATE) for how in GAINS]
        if any(pairs):
            rates = (
                None if pair is None else [prompt_win_rates(a[:, None], b[:, None]) for a, b in zip(*pair, strict=True)]
                for pair in pairs
            )
            cells = ("" if own is None else str(mean_interval(own)) for own in rates)
            rows.append((results.plan.label(name), *cells))
    return _table("win_rates", rows, GAINS.values())


def label_points(results: Results, curve: str, measure: str, how: str) -> list[tuple[float, Interval]]:
    """The label curve: (human labels, level of a measure), fewest first."""
    points = []
    for name, method in results.plan.methods.items():
        pair = results.pair(name, how, measure) if method.curve == curve else None
        if pair is not None:
            points.append((results.costs(name)["human_labels"], paired_difference(*pair)))
    if curve == "human" and points:
        points.append((0.0, Interval(0.0, 0.0, 0.0)))  # without labels there is nothing to train on: the start itself
    return sorted(points, key=lambda point: point[0])


def label_table(results: Results, measure: str) -> Table | None:
    """The label curve of people only and of the hybrid, as a table; None where no method is on the people's curve."""
    if not any(method.curve == "human" for method in results.plan.methods.values()):
        return None
    rows = []
    for how, said in HOWS.items():
        curves = {curve: dict(label_points(results, curve, measure, how)) for curve in ("human", "hybrid")}
        for labels in sorted(set(curves["human"]) | set(curves["hybrid"])):
            cells = [str(curves[curve].get(labels, "")) for curve in ("human", "hybrid")]
            rows.append((said, f"{labels:.0f}", *cells))
    return _table("labels", rows, measure=measure)


def reward_models(results: Results) -> Table | None:
    """Held-out accuracy of every reward model."""
    rows = []
    for name, found in results.accuracies().items():
        accuracies = [row["held_out"]["accuracy"]["mean"] for row in found if row.get("held_out")]
        pairs = found[0].get("pairs")
        source = "people" if results.plan.reward_models[name].human else "machine"
        accuracy = f"{np.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})" if accuracies else ""
        rows.append((name, source, str(pairs), str(len(found)), accuracy))
    return _table("reward_models", rows)


def validity(results: Results) -> Table | None:
    """What each term sees within the answers to one prompt."""
    found = results.validity()
    if not found:
        return None
    truths = found[0]["truths"]
    names = [name for name in found[0]["signals"] if all(name in one["signals"] for one in found)]
    rows = []
    for name in names:
        signals = [one["signals"][name] for one in found]
        cells = [f"{np.mean([signal[column] for signal in signals]):+.2f}" for column in (*truths, "length")]
        share, low, high = (np.mean([one["oracle_share"][key] for one in signals]) for key in ("mean", "low", "high"))
        rows.append((name, *cells, f"{share:.0%} [{low:.0%}, {high:.0%}]"))
    columns = [f"correlation with {column}" for column in (*truths, "length")]
    columns.append("share of the oracle's best-of-8 gain")
    means = {name: np.mean([one[name] for one in found]) for name in ("mean", "oracle")}
    facts = {name: found[0][name] for name in ("candidates", "prompts")}
    return _table("validity", rows, columns, starts=len(found), truth=truths[0], **facts, **means)


def costs(results: Results, methods: Sequence[str]) -> Table | None:
    """Time, memory and labels of each method, a run."""
    rows = []
    for name in methods:
        found = results.costs(name)
        found["memory"] = found["peak_memory_bytes"] / 2**20
        shown = ("train_seconds", "reward_model_seconds", "judge_seconds", "memory", "human_labels")
        rows.append((results.plan.label(name), *(f"{found.get(key, 0.0):.0f}" for key in shown)))
    return _table("costs", rows)
