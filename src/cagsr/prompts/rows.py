"""The rows of the data, and what is done to them wherever they come from: text columns, OpenAI's ``messages``, texts cut in two."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any, NamedTuple

from cagsr.config import DataConfig
from cagsr.errors import DataError

MESSAGES, TURNS = "messages", "turns"
USER_TURNS, ANSWERS = "user_turns", "answers_by_turn"
TEXT_COLUMNS = ("completion", "chosen", "rejected", "response", "reference", "references", "follow_up")
"""Columns that hold text under their usual names: a number in them is read as its digits."""


class Row(NamedTuple):
    """One row of the data, by column."""

    number: int
    """1-based position in its file (the line of a JSONL file; a CSV's header does not count)."""
    source: str
    """The file or Hub dataset it comes from, for messages."""
    values: Mapping[str, Any]
    from_messages: bool = False
    """Prompt and answer were taken from a column ``messages``."""


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, read anew at every iteration: nothing is kept in memory."""

    open: Callable[[], Iterator[Row]]
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return islice(self.open(), self.limit)


def number_as_text(value: Any) -> Any:
    """A number as its digits, also in a list; the very object where there is none. True and False are no numbers here."""
    if isinstance(value, float) and math.isnan(value):
        return None  # what a table has for nothing
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and any(number_as_text(item) is not item for item in value):
        return [number_as_text(item) for item in value]
    return value


def with_text(row: Row, columns: Collection[str]) -> Row:
    """Read numbers in text columns as text."""
    changed = {
        name: text
        for name, value in row.values.items()
        if name in columns and (text := number_as_text(value)) is not value
    }
    return row._replace(values={**row.values, **changed}) if changed else row


def without_messages(row: Row, prompt_column: str) -> Row:
    """Read OpenAI's ``messages`` (TRL's language-modelling rows) as a prompt and its answer, where no prompt is given.

    The last turn of the assistant, with the calls and results of tools within it, becomes ``completion``; all before it is
    the prompt. A conversation that ends otherwise is a prompt without an answer.
    """
    messages = row.values.get(MESSAGES)
    if prompt_column != "prompt" or prompt_column in row.values or not isinstance(messages, list | tuple):
        return row
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        return row
    values = {name: value for name, value in row.values.items() if name != MESSAGES}
    end = len(messages)
    if messages[-1].get("role") == "assistant":
        end = next((n for n in range(end, 0, -1) if messages[n - 1].get("role") not in ("assistant", "tool")), 0)
        values["completion"] = list(messages[end:])
    return row._replace(values={"prompt": list(messages[:end]), **values}, from_messages=True)


def content_of(content: Any) -> str | None:
    """The text of a message's content: text, or a list of parts of type text; None where it is neither."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else None


def turn_by_turn(row: Row, prompt_column: str) -> Row:
    """Read ``messages``, or ``turns`` (a list of what the user says), from the user's first message on.

    That message, with what stands before it, is the prompt; ``user_turns`` is a list of what the user says later,
    ``answers_by_turn`` one of what the assistant said to each of his messages (None: nothing). A row with a prompt stays as it is.
    """
    values = row.values
    if prompt_column != "prompt" or prompt_column in values:
        return row
    turns, messages = values.get(TURNS), values.get(MESSAGES)
    if isinstance(turns, list | tuple) and turns and all(isinstance(text, str) and text.strip() for text in turns):
        kept = {name: value for name, value in values.items() if name != TURNS}
        asked = {"prompt": [{"role": "user", "content": turns[0]}], USER_TURNS: list(turns[1:])}
        return row._replace(values={**kept, **asked}, from_messages=True)
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        return row
    starts = [place for place, message in enumerate(messages) if message.get("role") == "user"]
    if not starts:
        return row
    said = [messages[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)]
    kept = {name: value for name, value in values.items() if name != MESSAGES}
    later = [content_of(messages[start].get("content")) for start in starts[1:]]
    if not all(text and text.strip() for text in later):
        turn = 2 + next(place for place, text in enumerate(later) if not (text and text.strip()))
        raise DataError(
            f"{row.source}, row {row.number}: what the user says in turn {turn} is no text, or empty; mend it or leave the row out."
        )
    found: dict[str, Any] = {
        "prompt": list(messages[: starts[0] + 1]),
        USER_TURNS: later,
        ANSWERS: [
            next((content_of(one.get("content")) for one in reversed(own) if one.get("role") == "assistant"), None)
            for own in said
        ],
    }
    found["reference"] = values.get("reference", found[ANSWERS][0])
    return row._replace(values={**kept, **found}, from_messages=True)


def split_texts(rows: Rows, config: DataConfig) -> Rows:
    """Cut each row's text as ``config.split_text`` says; 0, or no text in the prompt column, leaves the rows as they are.

    The prompt column keeps the beginning and ``completion`` holds the rest, which scoring takes as the response and
    evaluation as the reference.
    """
    if config.split_text == 0:
        return rows

    def halves() -> Iterator[Row]:
        for row in rows:
            text = row.values.get(config.prompt_column)
            if isinstance(text, str):
                prompt, rest = split_at_space(text, config.split_text)
                row = row._replace(values={**row.values, config.prompt_column: prompt, "completion": rest})
            yield row

    return Rows(halves)


def split_at_space(text: str, share: float) -> tuple[str, str]:
    """Cut a text at the first white space from ``share`` of its characters on, with which the rest (or nothing) begins."""
    start = max(1, round(len(text) * share))
    position = next((index for index in range(start, len(text)) if text[index].isspace()), len(text))
    return text[:position], text[position:]
