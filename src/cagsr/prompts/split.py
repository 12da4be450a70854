"""Plain texts as prompts: the beginning of each text is the prompt, its rest the column ``completion``."""

from __future__ import annotations

from collections.abc import Iterator

from cagsr.config import DataConfig
from cagsr.prompts.load import Row, Rows

COMPLETION = "completion"


def split_texts(rows: Rows, config: DataConfig) -> Rows:
    """Cut each row's text as ``config.split_text`` says; 0 leaves the rows as they are.

    The prompt column keeps the beginning and ``completion`` holds the rest, which scoring takes as the response and
    evaluation as the reference. Rows whose prompt column holds no text stay as they are.
    """
    if config.split_text == 0:
        return rows

    def halves() -> Iterator[Row]:
        for row in rows:
            text = row.values.get(config.prompt_column)
            if isinstance(text, str):
                prompt, rest = split_at_space(text, config.split_text)
                row = row._replace(values={**row.values, config.prompt_column: prompt, COMPLETION: rest})
            yield row

    return Rows(rows.source, halves)


def split_at_space(text: str, share: float) -> tuple[str, str]:
    """Cut a text at the first white space from ``share`` of its characters on; the rest begins with that space.

    A text without white space there is all prompt, its rest empty.
    """
    start = max(1, round(len(text) * share))
    position = next((index for index in range(start, len(text)) if text[index].isspace()), len(text))
    return text[:position], text[position:]
