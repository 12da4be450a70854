"""The texts of a row that answers are held against: its references, its true follow-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cagsr.errors import DataError
from cagsr.evaluation.held_out import REFERENCE_COLUMNS
from cagsr.flow import Prompt

FOLLOW_UP_COLUMNS = ("follow_up", *REFERENCE_COLUMNS)


def first_column(prompts: Sequence[Prompt], names: Sequence[str]) -> str | None:
    """The first of ``names`` that any row has something in; None where none has."""
    return next((name for name in names if any(prompt.columns.get(name) for prompt in prompts)), None)


def column_texts(prompts: Sequence[Prompt], column: str | None) -> list[list[str]]:
    """The texts that each row has in a column, in TRL's forms: a text, several texts, or chat messages (the last one).

    No texts for a row without them, and for every row where ``column`` is None.

    Raises:
        DataError: a row whose column holds something else.
    """
    return [[] if column is None else _texts(prompt.columns.get(column), prompt, column) for prompt in prompts]


def prompt_words(prompt: Prompt) -> str:
    """What a person wrote of a prompt: its text, or the contents of its chat messages without the template's marks."""
    return prompt.text if prompt.messages is None else "\n".join(message["content"] for message in prompt.messages)


def _texts(value: Any, prompt: Prompt, column: str) -> list[str]:
    if not value:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Sequence):
        if isinstance(value[-1], Mapping) and isinstance(value[-1].get("content"), str):
            return [value[-1]["content"]]
        if not isinstance(value[-1], Mapping):
            return [text for item in value for text in _texts(item, prompt, column)]
    raise DataError(
        f"row {prompt.row}: column '{column}' holds {type(value).__name__}; give a text, a list of texts, or chat messages."
    )
