"""The tables of a report: levels, gains with intervals and corrected tests, contrasts, labels, ablations, validity, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cagsr.compare.plan import START, Plan
from cagsr.compare.results import GREEDY, MATCHED, SAMPLED, Results
from cagsr.evaluation.intervals import Interval, holm, mean_interval, paired_difference, paired_p_value
from cagsr.evaluation.win_rate import win_rates as prompt_win_rates

Floats = NDArray[np.float64]

GAINS = {
    SAMPLED: "sampled, against the start sampled alike",
    MATCHED: "sampled, against the start at matched entropy",
    GREEDY: "greedy, against the start greedy",
}
LOWER = ("missed", "added", "wrong", "perplexity", "follow_up_perplexity", "repetition", "self_bleu")
WIN_RATE = "reward_model"
"""The measure of an unseen reward model, which becomes a win rate."""


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def lower_is_better(plan: Plan, measure: str) -> bool:
    """Whether less of a measure is better."""
    return measure in LOWER or measure in plan.lower_is_better


def levels(results: Results, methods: Sequence[str]) -> Table:
    """Mean of every measure, for each method and decoding."""
    measures = results.measures
    rows = []
    for name in methods:
        for setting, how in ((SAMPLED, "sampled"), (GREEDY, "greedy")):
            if results.has(name, setting, measures[0]):
                cells = [_mean(results, name, setting, measure) for measure in measures]
                rows.append((results.plan.label(name), str(len(results.seeds(name))), how, *cells))
    return Table("Levels", ("method", "seeds", "decoding", *measures), tuple(rows), "Means over seeds and prompts.")


def _mean(results: Results, name: str, setting: str, measure: str) -> str:
    if not results.has(name, setting, measure):
        return ""
    return f"{np.nanmean(results.values(name, setting, measure)):.3f}"


@dataclass(frozen=True)
class PairedTest:
    """A paired difference with its interval and its p-value before correction."""

    method: str
    how: str
    measure: str
    difference: Interval
    p: float


def gain_tests(results: Results, methods: Sequence[str], measures: Sequence[str]) -> list[PairedTest]:
    """Every method against its start, in all three ways, in the given measures."""
    found = []
    for measure in measures:
        for name in methods:
            for how in GAINS:
                if results.can_gain(name, how, measure):
                    found.append(_test(name, how, measure, *results.gain(name, how, measure)))
    return found


def _test(method: str, how: str, measure: str, after: Floats, before: Floats) -> PairedTest:
    known = np.isfinite(after).all(axis=0) & np.isfinite(before).all(axis=0)
    after, before = after[:, known], before[:, known]
    return PairedTest(method, how, measure, paired_difference(after, before), paired_p_value(after, before))


def gains(results: Results, methods: Sequence[str], measures: Sequence[str], title: str) -> list[Table]:
    """One table a measure: each method's difference from its start, with 95 % intervals; stars after Holm's correction."""
    tests = gain_tests(results, methods, measures)
    seeds = {name: len(results.seeds(name)) for name in methods}

    def note(measure: str) -> str:
        better = "less is better" if lower_is_better(results.plan, measure) else "more is better"
        return (
            f"Difference in {measure} ({better}), 95 % bootstrap interval over seeds and prompts. "
            f"* p < 0.05 by the same bootstrap, after Holm's correction for {len(tests)} comparisons."
        )

    return _by_measure(results, title, tests, measures, seeds, GAINS, note)


def _by_measure(
    results: Results,
    title: str,
    tests: Sequence[PairedTest],
    measures: Sequence[str],
    seeds: Mapping[str, int],
    columns: Mapping[str, str],
    note: Callable[[str], str],
) -> list[Table]:
    """One table a measure, a row a method, a column a way of comparing; stars by Holm's correction over all ``tests``."""
    corrected = holm([test.p for test in tests])
    cells = {
        (test.measure, test.method, test.how): f"{test.difference}{'*' if p < 0.05 else ''}"
        for test, p in zip(tests, corrected, strict=True)
    }
    tables = []
    for measure in measures:
        rows = []
        for name, count in seeds.items():
            own = [cells.get((measure, name, how), "") for how in columns]
            if any(own):
                rows.append((results.plan.label(name), str(count), *own))
        if rows:
            header = ("method", "seeds", *columns.values())
            tables.append(Table(f"{title}: {measure}", header, tuple(rows), note(measure)))
    return tables


def contrasts(results: Results, measures: Sequence[str]) -> Table | None:
    """Methods against each other: greedy, sampled, and by their gains over their starts at matched entropy."""
    rows, ps = [], []
    for first, second in results.plan.contrasts:
        seeds = [seed for seed in results.seeds(first) if seed in results.seeds(second)]
        if not seeds or first == START:
            continue
        for measure in measures:
            for how in (GREEDY, MATCHED, SAMPLED):
                pair = _contrast(results, first, second, how, measure, seeds)
                if pair is not None:
                    test = _test(first, how, measure, *pair)
                    ps.append(test.p)
                    rows.append(
                        (
                            results.plan.label(first),
                            results.plan.label(second),
                            str(len(seeds)),
                            measure,
                            _how(how),
                            str(test.difference),
                        )
                    )
    if not rows:
        return None
    stars = ["*" if p < 0.05 else "" for p in holm(ps)]
    return Table(
        "Methods against each other",
        ("method", "against", "seeds", "measure", "how", "difference"),
        tuple((*row[:-1], row[-1] + star) for row, star in zip(rows, stars, strict=True)),
        "First less second, paired by seed and prompt, 95 % interval. At matched entropy: the difference of their gains, each over "
        "the start at that method's own entropy. * p < 0.05 after Holm's correction over this table.",
    )


def against(results: Results, methods: Sequence[str], base: str, measures: Sequence[str], title: str) -> list[Table]:
    """One table a measure: each method's difference from another on the seeds that both have, corrected together."""
    shared = {name: [seed for seed in results.seeds(name) if seed in results.seeds(base)] for name in methods}
    hows = {how: _how(how) for how in (SAMPLED, MATCHED, GREEDY)}
    tests = []
    for measure in measures:
        for name, seeds in shared.items():
            for how in hows:
                pair = _contrast(results, name, base, how, measure, seeds) if seeds else None
                if pair is not None:
                    tests.append(_test(name, how, measure, *pair))

    def note(measure: str) -> str:
        return (
            f"Difference in {measure} from {results.plan.label(base)} with the same seeds, paired by prompt, 95 % interval. "
            f"* p < 0.05 after Holm's correction for {len(tests)} comparisons."
        )

    counts = {name: len(seeds) for name, seeds in shared.items()}
    return _by_measure(results, title, tests, measures, counts, hows, note)


def _how(how: str) -> str:
    return {GREEDY: "greedy", MATCHED: "gain at matched entropy", SAMPLED: "sampled"}[how]


def _contrast(
    results: Results, first: str, second: str, how: str, measure: str, seeds: Sequence[int]
) -> tuple[Floats, Floats] | None:
    if how == MATCHED:
        if not results.can_gain(first, how, measure):
            return None
        after, before = results.gain(first, how, measure, seeds)
        if second == START:
            return after, before
        if not results.can_gain(second, how, measure):
            return None
        other_after, other_before = results.gain(second, how, measure, seeds)
        return after - before, other_after - other_before
    if not (results.has(first, how, measure) and results.has(second, how, measure)):
        return None
    return results.values(first, how, measure, seeds), results.values(second, how, measure, seeds)


def win_rates(results: Results, methods: Sequence[str]) -> Table | None:
    """How often the unseen reward model prefers a method's answer to its start's, decoded alike."""
    rows = []
    for name in methods:
        cells = []
        for how in (SAMPLED, MATCHED, GREEDY):
            if not results.can_gain(name, how, WIN_RATE):
                cells.append("")
                continue
            after, before = results.gain(name, how, WIN_RATE)
            rates = [
                prompt_win_rates(mine[:, None], theirs[:, None]) for mine, theirs in zip(after, before, strict=True)
            ]
            cells.append(str(mean_interval(rates)))
        if any(cells):
            rows.append((results.plan.label(name), *cells))
    if not rows:
        return None
    return Table(
        "Win rate under a reward model that no method was trained against",
        ("method", *GAINS.values()),
        tuple(rows),
        "Share of prompts on which the method's answer scores higher than the start's; ties count half; 95 % interval.",
    )


def label_points(results: Results, curve: str, measure: str, how: str) -> list[tuple[float, Interval]]:
    """The label curve: (human labels, level of a measure), fewest first."""
    points = []
    for name, method in results.plan.methods.items():
        if method.curve == curve and results.can_gain(name, how, measure):
            after, before = results.gain(name, how, measure)
            points.append((results.costs(name)["human_labels"], paired_difference(after, before)))
    if curve == "human" and points:
        points.append((0.0, Interval(0.0, 0.0, 0.0)))  # without labels there is nothing to train on: the start itself
    return sorted(points, key=lambda point: point[0])


def label_table(results: Results, measure: str) -> Table | None:
    """The label curve of people only and of the hybrid, as a table; None where no method is on the people's curve."""
    if not any(method.curve == "human" for method in results.plan.methods.values()):
        return None
    rows = []
    for how in (GREEDY, MATCHED, SAMPLED):
        curves = {curve: dict(label_points(results, curve, measure, how)) for curve in ("human", "hybrid")}
        for labels in sorted(set(curves["human"]) | set(curves["hybrid"])):
            cells = [str(curves[curve].get(labels, "")) for curve in ("human", "hybrid")]
            rows.append((_how(how), f"{labels:.0f}", *cells))
    if not rows:
        return None
    return Table(
        f"Human labels: {measure}",
        ("how", "labels (pairs)", "human preferences only", "hybrid with the self-reward"),
        tuple(rows),
        f"Difference in {measure} from the start, 95 % interval.",
    )


def reward_models(results: Results) -> Table | None:
    """Held-out accuracy of every reward model."""
    rows = []
    for name, found in results.accuracies().items():
        accuracies = [row["held_out"]["accuracy"]["mean"] for row in found if row.get("held_out")]
        pairs = found[0].get("pairs")
        source = "people" if results.plan.reward_models[name].human else "machine"
        accuracy = f"{np.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})" if accuracies else ""
        rows.append((name, source, str(pairs), str(len(found)), accuracy))
    if not rows:
        return None
    return Table(
        "Reward models",
        ("reward model", "pairs from", "pairs", "seeds", "held-out accuracy"),
        tuple(rows),
        "Share of a prompt's held-out pairs that it ranks right, mean over prompts; mean over seeds, and the range.",
    )


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
        share = np.mean([signal["oracle_share"]["mean"] for signal in signals])
        low = np.mean([signal["oracle_share"]["low"] for signal in signals])
        high = np.mean([signal["oracle_share"]["high"] for signal in signals])
        rows.append((name, *cells, f"{share:.0%} [{low:.0%}, {high:.0%}]"))
    first = found[0]
    return Table(
        "Does the reward see the truth?",
        (
            "signal",
            *(f"correlation with {truth}" for truth in truths),
            "correlation with length",
            "share of the oracle's best-of-8 gain",
        ),
        tuple(rows),
        f"Correlations within the {first['candidates']} answers to one prompt, {first['prompts']} held-out prompts, mean over "
        f"{len(found)} start models; the interval of the share is the mean of the starts' own over prompts. Mean {truths[0]} "
        f"{np.mean([one['mean'] for one in found]):.3f}, best of 8 by an oracle {np.mean([one['oracle'] for one in found]):.3f}.",
    )


def costs(results: Results, methods: Sequence[str]) -> Table:
    """Time, memory and labels of each method, a run."""
    rows = []
    for name in methods:
        found = results.costs(name)
        rows.append(
            (
                results.plan.label(name),
                f"{found.get('train_seconds', 0.0):.0f}",
                f"{found.get('reward_model_seconds', 0.0):.0f}",
                f"{found.get('judge_seconds', 0.0):.0f}",
                f"{found['peak_memory_bytes'] / 2**20:.0f}",
                f"{found.get('human_labels', 0.0):.0f}",
            )
        )
    return Table(
        "Costs",
        ("method", "training, s", "reward model, s", "judging, s", "peak memory, MiB", "human labels"),
        tuple(rows),
        "Means over seeds, as measured while jobs ran beside each other on the same cores; the memory is the whole process's.",
    )
