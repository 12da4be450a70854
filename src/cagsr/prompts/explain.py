"""Look at the salience of a prompt: which words count, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from cagsr.flow import EncodedPrompt


def explain_salience(encoded: EncodedPrompt, tokenizer: Any) -> list[tuple[str, float]]:
    """Return the salient words of a prompt with their weights, in the order of their first occurrence.

    A word is shown as the text of its tokens at its first occurrence, so that words that share a token, and pieces
    that a tokenizer glues to a word, show as what they are to the model.
    """
    shown: dict[int, str] = {}
    for word, run in groupby(zip(encoded.words, encoded.ids, strict=True), key=lambda pair: pair[0]):
        if word >= 0 and word not in shown:
            shown[word] = tokenizer.decode([token for _, token in run]).strip()
    return [(shown[index], weight) for index, weight in enumerate(encoded.salience)]


def salience_table(prompts: Sequence[EncodedPrompt], tokenizer: Any) -> Table:
    """Make a (rich) table, one row a prompt: its words in falling order of weight, as shares of the prompt's total."""
    table = Table(title="What counts in each prompt (share of the prompt's salience)", show_lines=True)
    table.add_column("row", justify="right")
    table.add_column("words that count", overflow="fold")
    table.add_column("tokens", justify="right")
    for encoded in prompts:
        total = sum(encoded.salience)
        words = sorted(explain_salience(encoded, tokenizer), key=lambda pair: -pair[1])
        table.add_row(
            str(encoded.prompt.row),
            Text("  ".join(f"{word} {weight / total:.0%}" for word, weight in words)),  # Text: [ ] is no markup
            str(len(encoded.ids)),
        )
    return table
