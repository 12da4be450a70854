"""SQLite files whose commits are on the disk when they return: how they are opened, changed, and what is said when that fails."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cagsr.errors import DataError, RunError


def connect(path: Path) -> sqlite3.Connection:
    """Open a database for one thread at a time, and make an empty one where there is none.

    Every commit waits until the log is on the disk (``synchronous = FULL``), so that neither a kill nor a power cut takes
    back what was confirmed. Transactions are the caller's to open (``transaction``).
    """
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing: commits at the end of the block, rolls back after an exception. No other writer gets between."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


@contextmanager
def database_errors(path: Path, what: str, flag: str) -> Iterator[None]:
    """Turn SQLite's errors into one sentence: RunError where the file can't be used, DataError where it is no database.

    ``what`` the file is ("ratings file") and the ``flag`` that names another one are said with it.
    """
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"{path} can't be used ({reason}); make it and its folder writable, or name another {flag}."
        ) from error
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is no {what} ({error}); choose another one with {flag}.") from error


def has_tables(connection: sqlite3.Connection) -> bool:
    """Whether anything was made in the file."""
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
