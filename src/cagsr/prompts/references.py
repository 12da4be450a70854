"""The texts of a row that answers are held against: its references, its true follow-up."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cagsr.errors import DataError
from cagsr.flow import Prompt
from cagsr.prompts.chat import texts_in
from cagsr.prompts.render import content_of, is_parts

REFERENCE_COLUMNS = ("references", "reference", "completion")
FOLLOW_UP_COLUMNS = ("follow_up", *REFERENCE_COLUMNS)


def first_column(prompts: Sequence[Prompt], names: Sequence[str]) -> str | None:
    """The first of ``names`` that any row has something in; None where none has."""
    return next((name for name in names if any(prompt.columns.get(name) for prompt in prompts)), None)


def column_texts(prompts: Sequence[Prompt], column: str | None) -> list[list[str]]:
    """The texts that each row has in a column (``texts_of``); none for every row where ``column`` is None."""
    found = []
    for prompt in prompts:
        value = None if column is None else prompt.columns.get(column)
        try:
            found.append(texts_of(value))
        except DataError as error:
            raise DataError(f"row {prompt.row}: column '{column}' {error}") from None
    return found


def prompt_words(prompt: Prompt) -> str:
    """What a person wrote of a prompt: its text, or the contents of its chat messages without the template's marks."""
    return prompt.text if prompt.messages is None else contents(prompt.messages)


def contents(messages: Iterable[Mapping[str, Any]]) -> str:
    """The contents of chat messages, a line each."""
    return "\n".join(text or "" for _, text in texts_in(list(messages)))


def texts_of(value: Any) -> list[str]:
    """The texts of one row's column in TRL's forms: a text, several texts, or chat messages (the last one); empty are none.

    Raises DataError for something else.
    """
    if value is None or (isinstance(value, str | Sequence) and not value):
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Sequence):
        if is_parts(value):
            content = content_of(value)
            if content is not None:
                return [content] if content.strip() else []
        elif isinstance(value[-1], Mapping):
            content = content_of(value[-1].get("content"))
            if content is not None:
                return [content]
        else:
            return [text for item in value for text in texts_of(item)]
    raise DataError(f"holds {type(value).__name__}; give a text, a list of texts, or chat messages.")
