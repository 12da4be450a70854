"""The diagnosis as tables on a terminal, as JSON, as Markdown, and its recommendation as YAML."""

import dataclasses
import json

import yaml
from rich.console import Console

from cagsr.config import AttentionConfig, RewardConfig
from cagsr.diagnosis.diagnose import Diagnosis
from cagsr.diagnosis.forecast import PILOT
from cagsr.diagnosis.recommend import ALL_WEIGHTS, yaml_of
from cagsr.diagnosis.signals import Setting
from cagsr.support.tables import markdown_table, plain, rich_table

Rows = list[list[str]]


def signal_table(found: Diagnosis) -> tuple[list[str], Rows]:
    """One row a signal: correlations within a prompt, and what picking by it gains."""
    header = ["signal", "length", "repetition", "within-prompt variance"]
    if found.truth_mean is not None:
        header[1:1] = ["truth", "truth, length fixed"]
        header += [f"best of {found.candidates}", "gain [95 %]", "of the oracle's gain"]
    rows = []
    for signal in found.signals:
        row = [signal.name, f"{signal.length:+.2f}", f"{signal.repetition:+.2f}", f"{signal.within_share:.0%}"]
        if signal.truth is not None and signal.gain is not None and signal.oracle_share is not None:
            row[1:1] = [f"{signal.truth:+.2f}", f"{signal.truth_held_fixed or 0.0:+.2f}"]
            row += [f"{signal.best_of_n:.3f}", f"{signal.gain:+.3f}", f"{signal.oracle_share:.0%}"]
        rows.append(row)
    return header, rows


def agreement_table(found: Diagnosis) -> tuple[list[str], Rows]:
    """Correlation of the single terms with each other, within a prompt."""
    names = [name for name in found.signals[0].others if name != "length"]
    single = [signal for signal in found.signals if signal.name in names]
    return ["term", *names], [[one.name, *(f"{one.others[name]:+.2f}" for name in names)] for one in single]


def setting_table(found: Diagnosis, pooling: str) -> tuple[list[str], Rows]:
    """Coverage by layers and threshold: correlation with the truth, length held fixed (without one: with length), and mean."""
    thresholds = sorted({one.setting.threshold for one in found.settings})
    cells = {}
    for one in found.settings:
        seen = one.length if one.truth_held_fixed is None else one.truth_held_fixed
        cells[one.setting] = f"{seen:+.2f} ({one.mean:.2f})"
    layers = dict.fromkeys(one.setting.layers for one in found.settings)
    rows = [[name, *(cells[Setting(name, pooling, threshold)] for threshold in thresholds)] for name in layers]
    return ["layers", *(f"tau {threshold:g}" for threshold in thresholds)], rows


def attack_table(found: Diagnosis) -> tuple[list[str], Rows]:
    """One row a term: the share of prompts on which the good answer is worth more than each attack."""
    terms = found.attacks[0].beaten
    return (
        ["term", *(one.name for one in found.attacks)],
        [[term, *(f"{one.beaten[term]:.0%}" for one in found.attacks)] for term in terms],
    )


def forecast_table(found: Diagnosis) -> tuple[list[str], Rows]:
    """One row a leash: when the recommended reward begins to hurt."""
    rows = []
    for one in found.forecasts:
        when = one.forecast
        step = f"{when.step:.0f} [{when.low:.0f}, {when.high:.0f}]" if when.turns else "not in this run"
        rows.append([f"{one.kl_coef:g}", step, f"{when.chance:.0%}", f"{one.kl:.1f}"])
    return ["kl_coef", "begins to hurt at step [80 %]", "chance that it does", "KL there, nats an answer"], rows


def headline(found: Diagnosis) -> list[str]:
    """What was sampled, in a few sentences."""
    truth = "No truth: neither --checker nor a reference in the rows."
    if found.truth_mean is not None:
        best = f"best of {found.candidates} by an oracle {found.oracle:.3f}"
        truth = f"Truth: {found.truth_name}; mean {found.truth_mean:.3f}, {best}."
    sampled = (
        f"{found.prompts} prompts, {found.candidates} answers each; {found.length:.1f} tokens on average, "
        f"{found.ended:.0%} ended by themselves, repetition {found.repetition:.3f}."
    )
    if found.faithfulness is None:
        return [sampled, truth]
    mean, share = found.faithfulness
    faithful = (
        f"Faithfulness of the attention: hiding the words that an answer looked at hardest costs it {mean:+.2f} nats a token more "
        f"than hiding those it looked at least; above 0 in {share:.0%} of the answers."
    )
    return [sampled, truth, faithful]


def print_report(found: Diagnosis, configured: Setting, console: Console) -> None:
    """Print everything, the recommendation last, where the eye falls."""
    for line in headline(found):
        console.print(line, highlight=False)
    for number, (title, header, rows) in enumerate(_tables(found, configured.pooling)):
        console.print(rich_table(title if number else f"{title}: correlation with", header, rows))
    for warning in found.warnings:
        console.print(f"[yellow]Warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
    for line in recommendation_lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def recommendation_lines(found: Diagnosis) -> list[str]:
    """Why, and the flags to paste."""
    lines = ["Recommendation:", *(f"  {reason}" for reason in found.recommendation.reasons)]
    if not found.recommendation.weights:
        return [*lines, "  No term helps here: don't spend a training run on this reward."]
    if found.recommendation.configured:
        return [*lines, "  Train with the settings that were measured."]
    setting, weights = found.recommendation.setting, found.recommendation.weights
    flags = [f"--attention.layers {setting.layers}", f"--reward.coverage.threshold {setting.threshold:g}"]
    flags += [f"--reward.{name}.weight {weights.get(name, 0.0):g}" for name in ALL_WEIGHTS]
    if found.recommendation.echo_allowed is not None:
        flags.append(f"--reward.echo.allowed {found.recommendation.echo_allowed:g}")
    return [
        *lines,
        "  The weights are for --reward.normalize within_prompt (the default) and scaled so that the reward's standard "
        "deviation within a prompt is 1.",
        "",
        "  " + " \\\n    ".join(["cagsr train ...", *flags]),
    ]


def finding(found: Diagnosis) -> str:
    """What it comes to, in one sentence: how well the recommended reward sees the truth, or that nothing helps."""
    over = f"{found.prompts:,} prompts, {found.candidates} answers each"
    if not found.recommendation.weights:
        return f"Diagnosed {over}: no term helps here."
    terms = ", ".join(found.recommendation.weights)
    signal = next(one for one in found.signals if one.name == "recommended reward")
    if signal.truth is None or signal.gain is None:
        return f"Diagnosed {over}: recommended are {terms}; nothing here tells the truth to test them against."
    return (
        f"Diagnosed {over}: recommended are {terms}, with a correlation of {signal.truth:+.2f} with {found.truth_name}; the "
        f"best of {found.candidates} by them gains {signal.gain:+.3f}."
    )


def as_json(found: Diagnosis) -> str:
    """Return all numbers as JSON text."""
    return json.dumps(plain(dataclasses.asdict(found)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_yaml(found: Diagnosis, model: str, attention: AttentionConfig, reward: RewardConfig) -> str:
    """Return the recommendation, with the settings it was measured under, as a file for ``cagsr train --config``."""
    comment = f"# What cagsr diagnose recommends for {model} on {found.prompts} prompts.\n"
    reasons = "".join(f"# {reason}\n" for reason in found.recommendation.reasons)
    if (reward.functions or reward.models) and not found.recommendation.configured:
        reasons += (
            "# Functions and reward models of the measured reward are not part of it: add them, if you want them.\n"
        )
    return comment + reasons + yaml.safe_dump(yaml_of(found.recommendation, attention, reward), sort_keys=False)


def as_markdown(found: Diagnosis, configured: Setting) -> str:
    """Return the report as Markdown."""
    parts = ["# Diagnosis\n", *headline(found), ""]
    for title, header, rows in _tables(found, configured.pooling):
        parts += [f"## {title}\n", markdown_table(header, rows), ""]
    parts += ["## Warnings\n", *(f"- {warning}" for warning in found.warnings or ("none",)), ""]
    parts += ["## Recommendation\n", "```", *recommendation_lines(found), "```", ""]
    return "\n".join(parts)


def _tables(found: Diagnosis, pooling: str) -> list[tuple[str, list[str], Rows]]:
    against = "length" if found.truth_mean is None else f"{found.truth_name}, length held fixed"
    settings = (
        f"Coverage by layers and threshold: correlation with {against} (mean coverage), pieces pooled by {pooling}"
    )
    tables = [
        ("Within the answers to one prompt", *signal_table(found)),
        ("Terms with each other", *agreement_table(found)),
        (settings, *setting_table(found, pooling)),
    ]
    if found.attacks:
        against = f"Answers made to fool the reward: how often {found.good_answers} are worth more"
        tables.append((against, *attack_table(found)))
    if found.forecasts:
        steps = found.forecasts[0].forecast.horizon
        tables.append((f"Forecast of {steps} steps by pilots of {PILOT}", *forecast_table(found)))
    return tables
