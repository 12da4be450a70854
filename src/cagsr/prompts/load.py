"""Rows from JSONL, JSON, CSV and Parquet files, folders of them, and the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cagsr.config import DataConfig
from cagsr.errors import DataError

_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class Row(NamedTuple):
    """One row of the data."""

    number: int
    """1-based position in its file (the line of a JSONL file; a CSV's header does not count)."""
    source: str
    """The file or Hub dataset it comes from, for messages."""
    values: Mapping[str, Any]
    """Column name -> value."""


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, read anew at every iteration: nothing is kept in memory."""

    source: str
    """What the user named."""
    open: Callable[[], Iterator[Row]]
    """Starts reading from the first row."""
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return islice(self.open(), self.limit)


def load_rows(config: DataConfig) -> Rows:
    """Find the data that ``config`` names; rows are read when the result is iterated.

    ``config.path`` is a ``.jsonl`` (or ``.ndjson``), ``.json`` (a list of objects, or JSON lines under that name),
    ``.csv`` or ``.parquet`` file, a folder of such files (those whose names say ``config.split``, all when no name
    says a split), or the id of a dataset on the Hugging Face Hub. Local files are read in place: no cache is written.
    JSON files are read whole, all others row by row.

    Raises:
        DataError: no such file or dataset, an unknown file type, a folder without data; while iterating: an empty
            file, malformed content (with the row's number), a Hub dataset that can't be reached.
    """
    if config.limit is not None and config.limit < 1:
        raise DataError(f"--data.limit must be 1 or more, not {config.limit}.")
    path = Path(config.path).expanduser()
    if path.is_file():
        reader = _reader(path, config)
        return Rows(config.path, lambda: _not_empty(reader(), str(path)), config.limit)
    if path.is_dir():
        readers = [_reader(file, config) for file in _files(path, config.split)]
        return Rows(
            config.path, lambda: _not_empty((row for reader in readers for row in reader()), str(path)), config.limit
        )
    if path.suffix.lower() in _READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path):
        raise DataError(f"No such file or folder: {config.path}; check --data.path.")
    return Rows(config.path, lambda: _not_empty(_hub(config), config.path), config.limit)


def _reader(path: Path, config: DataConfig) -> Callable[[], Iterator[Row]]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path}: unknown file type '{path.suffix}'; prompts are read from .jsonl, .json, .csv and .parquet files."
        )
    return lambda: read(path, config)


def _files(folder: Path, split: str) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix.lower() in _READERS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder}: the folder holds no .jsonl, .json, .csv or .parquet file.")
    splits = {file: _split_names(str(file.relative_to(folder).with_suffix(""))) for file in files}
    wanted = next((names for names in _SPLITS.values() if split in names), {split})
    chosen = [file for file in files if splits[file] & wanted]
    known = set().union(*splits.values())
    if not chosen and known:
        raise DataError(
            f"{folder}: no file for the split '{split}' (found: {', '.join(sorted(known))}); set --data.split or name "
            "one file with --data.path."
        )
    return chosen or files


def _split_names(name: str) -> set[str]:
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return words & set().union(*_SPLITS.values())


def _not_empty(rows: Iterator[Row], source: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: the file holds no rows; give at least one prompt.")
    yield first
    yield from rows


def _jsonl(path: Path, config: DataConfig) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _object(_parse(line, path, number), path, number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error.reason}); save it as UTF-8.") from error


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, row {number}: malformed JSON ({error.msg} at character {error.colno}); mend or remove that line."
        ) from error


def _object(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{path}, row {number}: each row must be a JSON object such as {{"prompt": "..."}}.')
    return Row(number, str(path), value)


def _json(path: Path, config: DataConfig) -> Iterator[Row]:
    """Read a list of objects, one by one so that a mistake has a row number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    cursor = space.match(text).end()  # type: ignore[union-attr]
    if text[cursor : cursor + 1] != "[":
        yield from _jsonl(path, config)
        return
    cursor = space.match(text, cursor + 1).end()  # type: ignore[union-attr]
    number = 0
    while text[cursor : cursor + 1] != "]" or number > 0:
        number += 1
        try:
            value, cursor = decoder.raw_decode(text, cursor)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, row {number}: malformed JSON ({error.msg} at line {error.lineno}, character {error.colno})."
            ) from error
        yield _object(value, path, number)
        cursor = space.match(text, cursor).end()  # type: ignore[union-attr]
        if text[cursor : cursor + 1] == "]":
            return
        if text[cursor : cursor + 1] != ",":
            raise DataError(f"{path}, row {number}: malformed JSON (a comma or ] must follow the row).")
        cursor = space.match(text, cursor + 1).end()  # type: ignore[union-attr]


def _csv(path: Path, config: DataConfig) -> Iterator[Row]:
    # Text stays text: pandas would turn a prompt column of numbers into numbers, and the words NA and None into nothing.
    return _local("csv", path, converters={config.prompt_column: str}, keep_default_na=False, na_values=[""])


def _parquet(path: Path, config: DataConfig) -> Iterator[Row]:
    return _local("parquet", path)


def _local(kind: str, path: Path, **options: Any) -> Iterator[Row]:
    # Streaming reads the file in place; without it datasets would copy it into its cache first.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        if path.stat().st_size == 0:
            return
        data = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        for number, values in enumerate(data, start=1):
            yield Row(number, str(path), values)
    except (ValueError, TypeError, OSError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{path}: not a readable {kind.upper()} file after row {number} ({_reason(error)}).") from error


def _hub(config: DataConfig) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        # A limited set is streamed too: only its first rows are downloaded.
        streaming = config.streaming or config.limit is not None
        data = load_dataset(config.path, config.name, split=config.split, streaming=streaming)
        for number, values in enumerate(data, start=1):
            yield Row(number, config.path, values)
    except (ValueError, TypeError, OSError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{config.path}: neither a file or folder here nor a dataset that the Hugging Face Hub gave "
            f"({_reason(error)}); check --data.path, --data.name and --data.split, and the network."
        ) from error


def _reason(error: BaseException) -> str:
    """Return the innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


_READERS: dict[str, Callable[[Path, DataConfig], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
