"""Signals against the checker over several models: correlations within a prompt, best-of-n shares, their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cagsr.diagnosis.best_of_n import picked
from cagsr.evaluation.intervals import Interval
from examples.e2e.signal_formulas import Floats, within_centred


@dataclass(frozen=True)
class Truths:
    """What is known of the answers of one model, ``(prompts, candidates)`` each."""

    said: Floats
    """Share of the prompt's facts that are said."""
    added: Floats
    """Added facts over the prompt's facts."""
    length: Floats
    """Tokens."""

    @property
    def net(self) -> Floats:
        """Facts said less added facts."""
        return self.said - self.added


@dataclass(frozen=True)
class Row:
    """One signal, over all models."""

    said: Interval
    """Correlation within a prompt with facts said."""
    added: Interval
    """The same with added facts."""
    length: Interval
    """The same with length."""
    share: Interval
    """Share of the oracle's best-of-n gain in facts said."""
    net_share: Interval
    """The same in facts said less added facts."""
    by_model: tuple[tuple[float, float, float], ...]
    """Correlations with facts said and added facts, and the first share, of each model."""


def measure(
    models: Sequence[tuple[Mapping[str, Floats], Truths]], resamples: int = 2000, seed: int = 0
) -> dict[str, Row]:
    """Measure each signal on each model; means over models, intervals over models and prompts.

    Args:
        models: signals and truths of each model, all on the same prompts.
        resamples: bootstrap draws; each draws models and prompts, the prompts alike for all models.
        seed: of the draws.
    """
    truths = [truth for _, truth in models]

    def interval(parts: Sequence[Floats], ratio: Callable[[Floats], Floats]) -> tuple[Interval, list[float]]:
        return crossed_interval(np.stack(parts), ratio, resamples, seed)

    rows = {}
    for name in models[0][0]:
        columns = [signals[name] for signals, _ in models]
        said, of_said = interval(
            [correlation_parts(x, t.said) for x, t in zip(columns, truths, strict=True)], correlation_of
        )
        added, of_added = interval(
            [correlation_parts(x, t.added) for x, t in zip(columns, truths, strict=True)], correlation_of
        )
        length, _ = interval(
            [correlation_parts(x, t.length) for x, t in zip(columns, truths, strict=True)], correlation_of
        )
        share, of_share = interval([share_parts(x, t.said) for x, t in zip(columns, truths, strict=True)], share_of)
        net, _ = interval([share_parts(x, t.net) for x, t in zip(columns, truths, strict=True)], share_of)
        rows[name] = Row(said, added, length, share, net, tuple(zip(of_said, of_added, of_share, strict=True)))
    return rows


@dataclass(frozen=True)
class Difference:
    """One signal less another, over all models, paired by model, prompt and answer."""

    said: Interval
    """Difference of the correlations with facts said."""
    added: Interval
    """The same with added facts: below 0, the first signal sees them better."""
    net_share: Interval
    """Difference of the shares of the oracle's gain in facts said less added facts."""


def difference(
    models: Sequence[tuple[Mapping[str, Floats], Truths]], first: str, second: str, resamples: int = 2000, seed: int = 0
) -> Difference:
    """What the first signal has over the second; arguments as in :func:`measure`."""

    def paired(parts: Callable[[Floats, Floats], Floats], ratio: Callable[[Floats], Floats], truth: str) -> Interval:
        both = [
            np.concatenate([parts(signals[name], getattr(known, truth)) for name in (first, second)], axis=1)
            for signals, known in models
        ]

        def less(sums: Floats) -> Floats:
            half = sums.shape[-1] // 2
            return ratio(sums[..., :half]) - ratio(sums[..., half:])

        return crossed_interval(np.stack(both), less, resamples, seed)[0]

    return Difference(
        paired(correlation_parts, correlation_of, "said"),
        paired(correlation_parts, correlation_of, "added"),
        paired(share_parts, share_of, "net"),
    )


def correlation_parts(x: Floats, y: Floats) -> Floats:
    """Sums of products of the deviations within each prompt: ``xy``, ``xx``, ``yy``, ``(prompts, 3)``."""
    a, b = within_centred(x), within_centred(y)
    # Values equal up to rounding do not vary.
    a = np.where(np.abs(a) > 1e-6 * np.abs(x), a, 0.0)
    return np.stack([(a * b).sum(axis=1), (a * a).sum(axis=1), (b * b).sum(axis=1)], axis=1)


def correlation_of(sums: Floats) -> Floats:
    """Correlation from the sums of ``correlation_parts`` over prompts, ``(..., 3)``; 0 where one side does not vary."""
    norm = np.sqrt(sums[..., 1] * sums[..., 2])
    return np.where(norm > 0, sums[..., 0] / np.where(norm > 0, norm, 1.0), 0.0)


def share_parts(x: Floats, truth: Floats) -> Floats:
    """For each prompt what picking by a signal gains over the mean answer, and what an oracle gains, ``(prompts, 2)``."""
    mean = truth.mean(axis=1)
    return np.stack([picked(x, truth) - mean, truth.max(axis=1) - mean], axis=1)


def share_of(sums: Floats) -> Floats:
    """Share of the oracle's gain from the sums of ``share_parts``, ``(..., 2)``; 0 where there is nothing to gain."""
    possible = sums[..., 1] > 1e-12
    return np.where(possible, sums[..., 0] / np.where(possible, sums[..., 1], 1.0), 0.0)


def crossed_interval(
    parts: Floats, ratio: Callable[[Floats], Floats], resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[Interval, list[float]]:
    """Mean over models of a ratio of sums over prompts, with its percentile bootstrap interval, and each model's ratio.

    Each draw takes models and prompts with replacement, the prompts alike for all models (they are crossed). With a
    handful of models the interval is somewhat too narrow, as in ``cagsr.evaluation.intervals``.

    Args:
        parts: ``(models, prompts, sums)``.
        ratio: from ``(..., sums)`` to ``(...)``.
        resamples: draws.
        seed: of the draws.
        confidence: of the interval.
    """
    models, prompts, _ = parts.shape
    generator = np.random.default_rng(seed)
    drawn_models = generator.multinomial(models, np.full(models, 1 / models), size=resamples)
    drawn_prompts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    ratios = ratio(np.einsum("rp,mpk->rmk", drawn_prompts, parts, optimize=True))  # (resamples, models)
    low, high = np.quantile((ratios * drawn_models).sum(axis=1) / models, [(1 - confidence) / 2, (1 + confidence) / 2])
    each = ratio(parts.sum(axis=1))
    return Interval(float(each.mean()), float(low), float(high)), [float(value) for value in each]


def as_markdown(rows: Mapping[str, Row]) -> str:
    """The table, one row a signal."""
    lines = [
        "| signal | facts said | added facts | length | of the oracle's gain | of the oracle's net gain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [
            signed_text(row.said),
            signed_text(row.added),
            f"{row.length.mean:+.2f}",
            share_text(row.share),
            share_text(row.net_share),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences_as_markdown(rows: Mapping[tuple[str, str], Difference]) -> str:
    """The table of paired differences."""
    lines = [
        "| signal | less this one | facts said | added facts | of the oracle's net gain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (first, second), row in rows.items():
        net = row.net_share
        mean, low, high = (_rounded(100 * number, 0) for number in (net.mean, net.low, net.high))
        points = f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]"
        lines.append(f"| {first} | {second} | {signed_text(row.said)} | {signed_text(row.added)} | {points} points |")
    return "\n".join(lines)


def _rounded(value: float, digits: int = 2) -> float:
    """Rounded, and never minus zero."""
    return round(value, digits) + 0.0


def signed_text(value: Interval) -> str:
    """A correlation as tables have it."""
    mean, low, high = (_rounded(number) for number in (value.mean, value.low, value.high))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def share_text(value: Interval) -> str:
    """A share as tables have it."""
    mean, low, high = (_rounded(100 * number, 0) for number in (value.mean, value.low, value.high))
    return f"{mean:.0f}% [{low:.0f}, {high:.0f}]"
