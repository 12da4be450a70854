"""What a newcomer reads: the stages, the table, the examples, on the terminal and as ``report.md``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cagsr.evaluation.intervals import Interval, paired_difference
from cagsr.flow import EncodedPrompt
from cagsr.html_page import fill
from cagsr.quickstart.before_after import MEASURES, TEXTS, Answered, BeforeAfter, Measure
from cagsr.quickstart.settings import QuickstartConfig
from cagsr.quickstart.task import read_prompt, stated_facts


def welcome(console: Console, folder: Path) -> None:
    """Say what is about to happen."""
    text = TEXTS["welcome"].format(folder=folder)
    console.print(Panel(text, title="cagsr quickstart", title_align="left", width=min(console.width, 100)))


def stage(console: Console, number: int, **sizes: int) -> None:
    """Print the heading of a stage, counted from 1, and why there is such a stage."""
    told = TEXTS["stages"][number - 1]
    console.print(f"\n[bold cyan]{number}/{len(TEXTS['stages'])}  {told['title']}[/bold cyan]")
    console.print(told["why"].format(**sizes), width=min(console.width, 100), highlight=False)


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
    note = TEXTS["table"].format(temperature=found.peaked.temperature)
    console.print(note, style="dim", width=min(console.width, 100), highlight=False)


def _title(found: BeforeAfter) -> str:
    draws = len(found.before.answers[0])
    return f"{len(found.before.answers)} held-out prompts, {draws} sampled answers to each, or the greedy one"


def verdict(found: BeforeAfter) -> list[str]:
    """Say in sentences whether the facts covered went up, with 95 % intervals, and what got worse."""
    gains = {
        "sampled": _gain(found.before, found.after, "facts_covered"),
        "against the start made as peaked": _gain(found.peaked, found.after, "facts_covered"),
        "greedy": _gain(found.before_greedy, found.after_greedy, "facts_covered"),
    }
    told = "; ".join(f"{name} {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" for name, gain in gains.items())
    up = [gain.low > 0 for gain in gains.values()]
    opening = "Facts covered went up" if any(up) else "Facts covered did NOT go up in this run"
    opening += ", but not in every comparison" if any(up) and not all(up) else ""
    sentences = [f"{opening}: {told} (mean difference with its 95 % interval)."]
    worse = [
        f"{measure.label} {found.peaked.mean(measure.key):.3f} -> {found.after.mean(measure.key):.3f}"
        for measure in MEASURES
        if measure.key in ("wrong_facts", "said_again", "repetition")
        and _gain(found.peaked, found.after, measure.key).low > 0
    ]
    if worse:
        sentences.append(f"Worse than the start made as peaked: {', '.join(worse)}.")
    return sentences


def _gain(before: Answered, after: Answered, key: str) -> Interval:
    return paired_difference(after.values[key].mean(axis=1), before.values[key].mean(axis=1))


def examples(prompts: Sequence[EncodedPrompt], found: BeforeAfter) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Pick three prompts that flatter nobody, at even distances in the list: each with (model, greedy answer, remark)."""
    count = min(3, len(prompts))
    chosen = []
    for number in ((2 * place + 1) * len(prompts) // (2 * count) for place in range(count)):
        prompt = prompts[number].prompt.text
        answers = {"before": found.before_greedy.answers[number][0], "after": found.after_greedy.answers[number][0]}
        chosen.append((prompt, [(name, answer, remark(prompt, answer)) for name, answer in answers.items()]))
    return chosen


def print_examples(console: Console, prompts: Sequence[EncodedPrompt], found: BeforeAfter) -> None:
    """Print example answers, greedy, with the facts they leave out and the ones they make up."""
    console.print("\n[bold]Three examples[/bold] (greedy; taken at even distances from the list, not chosen)")
    for prompt, answers in examples(prompts, found):
        console.print(Text(f"\n{prompt}", style="italic"))
        for name, answer, told in answers:
            line = Text.assemble((f"{name:<6}  ", "bold"), answer, (f"  {told}", "dim"))
            console.print(Padding(line, (0, 0, 0, 2)))


def remark(prompt: str, answer: str) -> str:
    """Tell in brackets which facts an answer leaves out and which it makes up, as ``(leaves out: pet)``."""
    facts, stated = read_prompt(prompt), set(stated_facts(prompt, answer))
    missed = [kind for kind, value in facts.items() if (kind, value) not in stated]
    wrong = sorted(value for kind, value in stated if facts.get(kind) != value)
    parts = [f"leaves out: {', '.join(missed)}"] * bool(missed) + [f"makes up: {', '.join(wrong)}"] * bool(wrong)
    return f"({'; '.join(parts) or 'all facts'})"


def as_markdown(prompts: Sequence[EncodedPrompt], found: BeforeAfter, config: QuickstartConfig) -> str:
    """The report as a Markdown file: table, verdict, examples, settings."""
    text = fill(
        "quickstart",
        "report.md.jinja",
        escaped=False,
        title=_title(found),
        verdict=verdict(found),
        columns=list(found.columns()),
        rows=table_rows(found),
        temperature=found.peaked.temperature,
        examples=examples(prompts, found),
        config=config,
    )
    return text + "\n"


def next_steps(console: Console, folder: Path, seconds: float) -> None:
    """Say where everything is and what to do next."""
    console.print(f"\n[bold]Done in {seconds / 60:.1f} minutes.[/bold] In {folder}/:")
    for name, what in TEXTS["files"].items():
        console.print(f"  {name:<19}{what}", highlight=False)
    console.print("\n[bold]Next[/bold]")
    for one in TEXTS["next"]:
        command = one["command"].format(folder=folder)
        console.print(f"  [dim]# {one['why']}[/dim]\n  {command}", highlight=False, soft_wrap=True)
