"""Rows of JSON and JSONL files: one object a line, a list of objects, or objects over several lines each."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cagsr.errors import DataError
from cagsr.prompts.rows import Row, number_as_text

_DECODER = json.JSONDecoder()
_AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str)


def read_lines(path: Path, text_columns: Collection[str]) -> Iterator[Row]:
    """Read JSON lines, row by row; a file whose first object goes over several lines is read whole.

    Raises DataError, with file and row, for malformed JSON, a row that is no object, text that is not UTF-8.
    """
    first = True
    with _utf8(path), path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if first and line.lstrip()[0] in "{[" and error.pos >= len(line.rstrip()):
                    break  # the line ends in the middle of an object
                raise DataError(
                    f"{path}, row {number}: malformed JSON ({error.msg} at character {error.colno}); mend or remove that line."
                ) from error
            yield _row(value, line, path, number, text_columns)
            first = False
        else:
            return
    yield from read_document(path, text_columns)


def read_document(path: Path, text_columns: Collection[str]) -> Iterator[Row]:
    """Read a file whole: a list of objects, or objects one after another, each over as many lines as it likes.

    They are decoded one by one, so that a mistake has a row number.
    """
    with _utf8(path):
        text = path.read_text(encoding="utf-8-sig")
    cursor = _skip(text, 0)
    listed = text[cursor : cursor + 1] == "["
    cursor = _skip(text, cursor + listed)
    number = 0
    while cursor < len(text) if not listed else text[cursor : cursor + 1] != "]" or number > 0:
        number += 1
        start = cursor
        try:
            value, cursor = _DECODER.raw_decode(text, cursor)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, row {number}: malformed JSON ({error.msg} at line {error.lineno}, character {error.colno}); mend or "
                "remove that row."
            ) from error
        yield _row(value, text[start:cursor], path, number, text_columns)
        cursor = _skip(text, cursor)
        if not listed:
            continue
        if text[cursor : cursor + 1] == "]":
            return
        if text[cursor : cursor + 1] != ",":
            raise DataError(f"{path}, row {number}: malformed JSON (a comma or ] must follow the row).")
        cursor = _skip(text, cursor + 1)


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error.reason}); save it as UTF-8.") from error


def _row(value: Any, written: str, path: Path, number: int, text_columns: Collection[str]) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{path}, row {number}: each row must be a JSON object such as {{"prompt": "..."}}.')
    if r"\ud" in written.lower():  # the only way that JSON has to write half a pair
        _check_surrogates(value, f"{path}, row {number}")
    numbers = [name for name in value if name in text_columns and number_as_text(value[name]) is not value[name]]
    if numbers:
        as_written = _AS_WRITTEN.decode(written.strip())
        value |= {name: as_written[name] for name in numbers}
    return Row(number, str(path), value)


def _check_surrogates(row: dict[str, Any], where: str) -> None:
    """Refuse half of a surrogate pair, which is no character: no tokenizer reads it and no file can hold it."""
    for name, entry in row.items():
        for place, part in (("a column's name", name), (f"column '{name}'", entry)):
            try:
                json.dumps(part, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: {place} holds half a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no "
                    "character; mend or remove that row."
                ) from error


def _skip(text: str, cursor: int) -> int:
    return next((place for place in range(cursor, len(text)) if not text[place].isspace()), len(text))
