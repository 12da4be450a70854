"""What a newcomer reads: the stages, the table, the examples, on the terminal and as ``report.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cagsr.evaluation.metrics import paired_difference
from cagsr.flow import EncodedPrompt
from cagsr.quickstart.before_after import MEASURES, Answered, BeforeAfter, Measure
from cagsr.quickstart.task import read_prompt, stated_facts

STAGES = (
    (
        "A start model",
        "A tiny Llama with random weights learns to describe people, restaurants and products from {pairs:,} pairs of "
        "prompt and answer. Their writer was in a hurry and left out one fact in four, so the model learns that too: it "
        "can say every fact and often doesn't. This is the only stage with labels.",
    ),
    (
        "A judge",
        "The same recipe with other random weights gives a second model. It takes no part in the training; it only "
        "tells in stage 4 how natural the answers read (perplexity).",
    ),
    (
        "CAGSR: reinforcement learning without labels",
        "Now come {prompts:,} new prompts and no answers. The start writes eight answers to a prompt; the reward is read "
        "from its own attention while it writes: was each important word of the prompt looked at by the word that says "
        "it, and in few words? PPO makes the better answers likelier and stays close to the start (the KL).",
    ),
    (
        "Before and after",
        "Both models answer {held_out:,} prompts that neither has seen. A checker that knows the facts counts them; the "
        "reward never saw that checker.",
    ),
)
"""Title and explanation of each stage."""


def welcome(console: Console, folder: Path) -> None:
    """Say what is about to happen."""
    console.print(
        Panel(
            "A small language model is made from nothing and then improved with CAGSR: reinforcement learning on prompts "
            "without answers, where the reward is the attention that the model itself pays to the prompt. Everything "
            f"happens on this machine, offline, in a few minutes. Files go to [bold]{folder}/[/bold].",
            title="cagsr quickstart",
            title_align="left",
            width=min(console.width, 100),
        )
    )


def stage(console: Console, number: int, **sizes: int) -> None:
    """Print the heading of a stage, counted from 1, and why there is such a stage."""
    title, why = STAGES[number - 1]
    console.print()
    console.print(f"[bold cyan]{number}/{len(STAGES)}  {title}[/bold cyan]")
    console.print(why.format(**sizes), width=min(console.width, 100), highlight=False)


def table_rows(found: BeforeAfter) -> list[tuple[Measure, dict[str, float]]]:
    """Each measure with the mean of each column."""
    return [
        (measure, {name: answered.mean(measure.key) for name, answered in found.columns().items()})
        for measure in MEASURES
    ]


def print_table(console: Console, found: BeforeAfter) -> None:
    """Print the table of means; the columns after training stand out."""
    table = Table(title=_title(found), title_justify="left")
    table.add_column("", no_wrap=True)
    for name in found.columns():
        table.add_column(name.replace(", ", "\n"), justify="right", style="bold" if name.startswith("after") else "")
    for measure, means in table_rows(found):
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[measure.better]
        table.add_row(measure.label + arrow, *(f"{value:.{measure.digits}f}" for value in means.values()))
    console.print(table)
    console.print(
        f"↑ higher is better, ↓ lower. T = {found.peaked.temperature:.2f}: the start made as peaked as the trained model "
        "(same entropy), because peaked models look better for that reason alone.",
        style="dim",
        width=min(console.width, 100),
        highlight=False,
    )


def _title(found: BeforeAfter) -> str:
    draws = len(found.before.answers[0])
    return f"{len(found.before.answers)} held-out prompts, {draws} sampled answers to each, or the greedy one"


def verdict(found: BeforeAfter) -> list[str]:
    """Say in sentences whether the facts covered went up, with 95 % intervals, and what got worse."""
    gains = {
        "sampled": _gain(found.before, found.after),
        "against the start made as peaked": _gain(found.peaked, found.after),
        "greedy": _gain(found.before_greedy, found.after_greedy),
    }
    told = "; ".join(f"{name} {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" for name, gain in gains.items())
    up = [gain.low > 0 for gain in gains.values()]
    opening = (
        "Facts covered went up"
        if all(up)
        else "Facts covered went up, but not in every comparison"
        if any(up)
        else "Facts covered did NOT go up in this run"
    )
    sentences = [f"{opening}: {told} (mean difference with its 95 % interval)."]
    worse = [
        f"{measure.label} {found.peaked.mean(measure.key):.3f} -> {found.after.mean(measure.key):.3f}"
        for measure in MEASURES
        if measure.key in ("wrong_facts", "said_again", "repetition") and _worse(found.peaked, found.after, measure.key)
    ]
    if worse:
        sentences.append(f"Worse than the start made as peaked: {', '.join(worse)}.")
    return sentences


def _gain(before: Answered, after: Answered) -> Any:
    return paired_difference(after.per_prompt("facts_covered"), before.per_prompt("facts_covered"))


def _worse(before: Answered, after: Answered, key: str) -> bool:
    return paired_difference(after.per_prompt(key), before.per_prompt(key)).low > 0


def example_numbers(found: BeforeAfter, count: int = 3) -> list[int]:
    """Pick examples that flatter nobody: prompts at even distances in the list."""
    prompts = len(found.before.answers)
    count = min(count, prompts)
    return [(2 * number + 1) * prompts // (2 * count) for number in range(count)]


def print_examples(console: Console, prompts: Sequence[EncodedPrompt], found: BeforeAfter) -> None:
    """Print example answers, greedy, with the facts they leave out and the ones they make up."""
    console.print("\n[bold]Three examples[/bold] (greedy; taken at even distances from the list, not chosen)")
    for number in example_numbers(found):
        prompt = prompts[number].prompt.text
        console.print(Text(f"\n{prompt}", style="italic"))
        for name, answered in (("before", found.before_greedy), ("after ", found.after_greedy)):
            answer = answered.answers[number][0]
            told = Text.assemble((f"{name}  ", "bold"), answer, (f"  {remark(prompt, answer)}", "dim"))
            console.print(Padding(told, (0, 0, 0, 2)))


def remark(prompt: str, answer: str) -> str:
    """Tell in brackets which facts an answer leaves out and which it makes up, as ``(leaves out: pet)``."""
    facts, stated = read_prompt(prompt), set(stated_facts(prompt, answer))
    missed = [kind for kind, value in facts.items() if (kind, value) not in stated]
    wrong = sorted(value for kind, value in stated if facts.get(kind) != value)
    parts = [f"leaves out: {', '.join(missed)}"] * bool(missed) + [f"makes up: {', '.join(wrong)}"] * bool(wrong)
    return f"({'; '.join(parts) or 'all facts'})"


def as_markdown(prompts: Sequence[EncodedPrompt], found: BeforeAfter, judge: str, settings: Mapping[str, Any]) -> str:
    """The report as a Markdown file: table, verdict, examples, settings."""
    columns = list(found.columns())
    lines = ["# Quickstart: before and after CAGSR", "", *verdict(found), ""]
    lines += [f"| {_title(found)} | {' | '.join(columns)} |"]
    lines += ["| --- |" + " ---: |" * len(columns)]
    for measure, means in table_rows(found):
        better = f", {measure.better} is better" if measure.better else ""
        cells = " | ".join(f"{value:.{measure.digits}f}" for value in means.values())
        lines.append(f"| {measure.label}{better} | {cells} |")
    lines += [
        "",
        f"`before, T={found.peaked.temperature:.2f}` is the start at the temperature at which its entropy is the trained "
        f"model's. The judge of the perplexity is `{judge}`: the start's recipe with other random weights, no reinforcement.",
        "",
        "![training curves](run/curves.png)",
        "",
        "## Examples (greedy, at even distances in the list)",
    ]
    for number in example_numbers(found):
        prompt = prompts[number].prompt.text
        lines += ["", f"> {prompt}", ""]
        for name, answered in (("before", found.before_greedy), ("after", found.after_greedy)):
            answer = answered.answers[number][0]
            lines.append(f"- {name}: {answer} *{remark(prompt, answer)}*")
    lines += ["", "## Settings", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    return "\n".join(lines)


def next_steps(console: Console, folder: Path, seconds: float) -> None:
    """Say where everything is and what to do next."""
    files = {
        "report.md": "this table and the examples",
        "run/curves.png": "the training curves",
        "run/": "the training run: config, metrics, samples, checkpoint",
        "start/, run/final/": "the models, in Hugging Face layout",
        "answers.jsonl": "all held-out prompts with all answers",
    }
    console.print(f"\n[bold]Done in {seconds / 60:.1f} minutes.[/bold] In {folder}/:")
    for name, what in files.items():
        console.print(f"  {name:<19}{what}", highlight=False)
    prompts = folder / "prompts.jsonl"
    console.print("\n[bold]Next[/bold]")
    for command, why in (
        (
            f"cagsr diagnose --model {folder / 'start'} --data {prompts} --checker cagsr.quickstart.task.facts_metric",
            "what does each reward term see in this model? Here a checker knows the truth",
        ),
        (f"cagsr report {folder}", "the training run as a page: curves, warnings, answers over time, costs"),
        (
            "cagsr diagnose --model YOUR_MODEL --data YOUR_PROMPTS.jsonl",
            "the same for a model of yours, before you train it",
        ),
        ("cagsr train --model YOUR_MODEL --data YOUR_PROMPTS.jsonl --output_dir run", "CAGSR on your own model"),
        (f"cagsr train --config {folder / 'run' / 'config.yaml'} --output_dir again", "repeat this run, change a flag"),
    ):
        console.print(f"  [dim]# {why}[/dim]\n  {command}", highlight=False, soft_wrap=True)
