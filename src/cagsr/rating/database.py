"""The ratings' file: SQLite with a write-ahead log, every rating on the disk before it is confirmed."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from cagsr.errors import DataError, RunError
from cagsr.rating.rating_questions import RatingQuestion

APPLICATION = 0x63616773
"""What SQLite's header says of files that are ours ("cags")."""
VERSION = 1


def create_database(path: Path, questions: Sequence[RatingQuestion], settings: Mapping[str, object]) -> None:
    """Make the file with its questions, in one transaction, readable by its owner alone (it holds the page's token).

    Raises:
        RunError: the file can't be written.
        DataError: something else lies there.
    """
    with database_errors(path):
        path.touch(mode=0o600)
        with closing(_connect(path)) as connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise DataError(f"{path} holds another database; choose a new name with --db.")
            connection.execute("PRAGMA journal_mode = WAL")
            with transaction(connection):
                for statement in Path(__file__).with_name("schema.sql").read_text(encoding="utf-8").split(";\n"):
                    connection.execute(statement)
                everything = {"token": secrets.token_urlsafe(32), "database": secrets.token_hex(8), **settings}
                connection.executemany(
                    "INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in everything.items()]
                )
                connection.executemany(
                    "INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (one.id, number, json.dumps(one.prompt, ensure_ascii=False), one.a, one.b, one.gold)
                        for number, one in enumerate(questions)
                    ],
                )
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")


def open_database(path: Path) -> sqlite3.Connection:
    """Open a ratings file, for one thread at a time.

    Every commit waits until the log is on the disk (``synchronous = FULL``), so that neither a kill nor a power cut takes
    back what was confirmed.

    Raises:
        DataError: no such file, or not one of ours, or one of a later cagsr.
        RunError: it can't be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such ratings file; cagsr rate serve makes one (--db names it).")
    with database_errors(path):
        connection = _connect(path)
        try:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if application != APPLICATION:
                raise DataError(f"{path} is no ratings file of cagsr rate; choose another one with --db.")
            if version > VERSION:
                raise DataError(f"{path} comes from a later version of cagsr; choose another one with --db.")
        except (sqlite3.Error, DataError):
            connection.close()
            raise
    return connection


def was_created(path: Path) -> bool:
    """Whether a ratings file is there; what a kill left of its making (an empty database) is none."""
    if not path.exists():
        return False
    with database_errors(path), closing(_connect(path)) as connection:
        return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing: commits at the end of the block, rolls back after an exception. No other writer gets between."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one sentence.

    Raises:
        DataError: the file is no database, or a damaged one.
        RunError: it can't be opened or written.
    """
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"{path} can't be used ({reason}); make it and its folder writable, or name another --db."
        ) from error
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is no ratings file ({error}); choose another one with --db.") from error


def _connect(path: Path) -> sqlite3.Connection:
    # Transactions are ours to open (isolation_level None); the store lets one thread in at a time.
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection
