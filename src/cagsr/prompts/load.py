"""Rows from JSONL, JSON, CSV and Parquet files, folders of them, datasets saved to disk, and the Hugging Face Hub."""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cagsr.config import DataConfig
from cagsr.errors import DataError
from cagsr.models.files import is_lfs_pointer
from cagsr.prompts.rows import TEXT_COLUMNS, Row, Rows, number_as_text, turn_by_turn, with_text, without_messages

__all__ = ["HEAD_ROWS", "Row", "Rows", "load_rows"]

HEAD_ROWS = 1_000
"""Rows of a streamed set that are kept in memory for evaluation and inspection."""
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SAVED = ("state.json", "dataset_info.json")
_ABOUT = {*_SAVED, "dataset_infos.json", "dataset_dict.json"}
"""Files that ``datasets`` puts beside data: they describe it and hold no rows."""
_DECODER = json.JSONDecoder()
_AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str)


def load_rows(config: DataConfig, text_columns: Collection[str] = ()) -> Rows:
    """Find the data that ``config`` names; rows are read when the result is iterated.

    ``config.path`` is a ``.jsonl`` (or ``.ndjson``), ``.json`` (a list of objects, or objects one after another),
    ``.csv`` or ``.parquet`` file, a folder of such files (those whose names say ``config.split``, all when no name
    says a split), a folder that ``datasets`` saved with ``save_to_disk``, or the id of a dataset on the Hugging Face Hub.
    Local files are read in place: no cache is written. JSON files are read whole, all others row by row.

    Text columns are text: a CSV's cells are taken as they are written (``042``, ``1.50``, nothing), numbers of other files
    become their digits. They are the prompt column, those named in ``TEXT_COLUMNS`` and ``text_columns``; all others keep
    their types. A row of OpenAI's ``messages`` without a prompt becomes prompt and completion (``without_messages``), or is read
    from its first turn on (``turn_by_turn``), as ``config.messages`` says.

    Raises DataError: no such file or dataset, an unknown file type, a folder without data, a Git LFS pointer; while iterating
    an empty file, malformed content (with the row's number), a Hub dataset that can't be reached.
    """
    columns = frozenset((config.prompt_column, *TEXT_COLUMNS, *text_columns))
    of_messages = turn_by_turn if config.messages == "first_turn" else without_messages

    def rows(readers: list[Callable[[], Iterator[Row]]], source: str) -> Rows:
        def opened() -> Iterator[Row]:
            empty = True
            for row in (row for reader in readers for row in reader()):
                empty = False
                yield of_messages(with_text(row, columns), config.prompt_column)
            if empty:
                raise DataError(f"{source}: the file holds no rows; give at least one prompt.")

        return Rows(opened, config.limit)

    path = Path(config.path).expanduser()
    if path.is_file():
        return rows([_reader(path, columns)], str(path))
    # What ``datasets`` saved with ``save_to_disk``: one set, or one for each split.
    if (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in _SAVED):
        return rows([lambda: _saved(path, config)], str(path))
    if path.is_dir():
        return rows([_reader(file, columns) for file in _files(path, config.split)], str(path))
    if path.suffix.lower() in _READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path):
        raise DataError(f"No such file or folder: {config.path}; check --data.path.")
    return rows([lambda: _hub(config)], config.path)


def _reader(path: Path, columns: frozenset[str]) -> Callable[[], Iterator[Row]]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path}: unknown file type '{path.suffix}'; prompts are read from .jsonl, .json, .csv and .parquet files."
        )
    if is_lfs_pointer(path):
        raise DataError(f"{path}: is a Git LFS pointer, not the data itself; run 'git lfs pull' there, or download it.")
    return lambda: read(path, columns)


def _files(folder: Path, split: str) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix.lower() in _READERS
        and file.name not in _ABOUT
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder}: the folder holds no .jsonl, .json, .csv or .parquet file.")
    known_names = set().union(*_SPLITS.values())
    splits = {
        file: known_names & set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder).with_suffix("")).lower()))
        for file in files
    }
    chosen = [file for file in files if splits[file] & _names_of(split)]
    known = set().union(*splits.values())
    if not chosen and known:
        raise DataError(
            f"{folder}: no file for the split '{split}' (found: {', '.join(sorted(known))}); set --data.split or name "
            "one file with --data.path."
        )
    return chosen or files


def _names_of(split: str) -> set[str]:
    """What a split may also be called."""
    return next((names for names in _SPLITS.values() if split in names), {split})


def _json_lines(path: Path, text_columns: Collection[str]) -> Iterator[Row]:
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
            yield _json_row(value, line, path, number, text_columns)
            first = False
        else:
            return
    yield from _json_document(path, text_columns)


def _json_document(path: Path, text_columns: Collection[str]) -> Iterator[Row]:
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
        yield _json_row(value, text[start:cursor], path, number, text_columns)
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


def _json_row(value: Any, written: str, path: Path, number: int, text_columns: Collection[str]) -> Row:
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


def _csv(path: Path, columns: Collection[str]) -> Iterator[Row]:
    # Text stays text: pandas would turn columns of numbers into numbers, and the words NA and None into nothing.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        header = next(csv.reader(lines), [])
    return _local(
        "csv",
        path,
        converters={name: str for name in header if name in columns},
        keep_default_na=False,
        na_values={name: [""] for name in header if name not in columns},
    )


def _local(kind: str, path: Path, **options: Any) -> Iterator[Row]:
    def opened() -> Iterable[Any]:
        from datasets import load_dataset

        if path.stat().st_size == 0:
            return ()
        # Streaming reads the file in place; without it datasets would copy it into its cache first.
        return _with_media_closed(load_dataset(kind, data_files=str(path), split="train", streaming=True, **options))

    return _dataset(str(path), opened, f"not a readable {kind.upper()} file after row {{row}} ({{reason}}).")


def _dataset(source: str, opened: Callable[[], Iterable[Any]], problem: str) -> Iterator[Row]:
    """The rows of what ``datasets`` opens; ``problem`` says what is wrong where it can't be read, with ``row`` and ``reason``."""
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        for number, values in enumerate(opened(), start=1):
            yield Row(number, source, values)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200].rstrip(".") or type(cause).__name__
        raise DataError(f"{source}: {problem.format(row=number, reason=reason)}") from error


def _with_media_closed(data: Any) -> Any:
    """A dataset whose images and sounds stay files: each is opened when its prompt is read, and not all are held decoded."""
    from datasets import Audio, Image, List

    for name, feature in dict(getattr(data, "features", None) or {}).items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
        elif isinstance(feature, Audio):
            data = data.cast_column(name, Audio(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(name, List(Image(decode=False)))
    return data


def _saved(folder: Path, config: DataConfig) -> Iterator[Row]:
    def opened() -> Iterable[Any]:
        from datasets import DatasetDict, load_from_disk

        data = load_from_disk(str(folder))
        if not isinstance(data, DatasetDict):
            return _with_media_closed(data)
        wanted = _names_of(config.split)
        name = config.split if config.split in data else next((name for name in data if name in wanted), None)
        if name is None:
            found = ", ".join(map(str, data))
            raise DataError(f"{folder}: no split '{config.split}' (found: {found}); set --data.split.")
        return _with_media_closed(data[name])

    return _dataset(str(folder), opened, "the dataset saved there can't be read ({reason}).")


def _hub(config: DataConfig) -> Iterator[Row]:
    def opened() -> Iterable[Any]:
        from datasets import load_dataset

        # A limited set is streamed too: only its first rows are downloaded.
        streaming = config.streaming or config.limit is not None
        return _with_media_closed(load_dataset(config.path, config.name, split=config.split, streaming=streaming))

    problem = (
        "neither a file or folder here nor a dataset that the Hugging Face Hub gave ({reason}); check --data.path, "
        "--data.name and --data.split, and the network."
    )
    return _dataset(config.path, opened, problem)


_READERS: dict[str, Callable[[Path, Collection[str]], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_document,
    ".csv": _csv,
    ".parquet": lambda path, columns: _local("parquet", path),
}
