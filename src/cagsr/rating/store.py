"""The ratings file: SQLite with a write-ahead log, every rating on the disk before it is confirmed, and kept once."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cagsr.errors import DataError
from cagsr.rating.rating_questions import PromptText, RatingQuestion
from cagsr.support.database import connect, database_errors, has_tables, transaction

APPLICATION = 0x63616773
"""What SQLite's header says of files that are ours ("cags")."""
VERSION = 1
NAMED = ("ratings file", "--db")
"""What sentences call it, and the flag that names another one."""

Choice = Literal["a", "b", "tie", "both_bad", "skip"]
Shown = Literal["left", "right", "tie", "both_bad", "skip"]
"""A choice as the rater sees it."""
Marks = Mapping[Any, Mapping[str, int]]
"""Side -> scale -> 1 to 5."""
Outcome = Literal["done", "before", "undone", "conflict", "unknown"]
"""done: now; before: by an earlier copy of the same message; undone: it was taken back since; conflict: another rating
stands there; unknown: no such rater or question."""

SCALES = ("relevance", "fluency", "helpfulness")


@dataclass(frozen=True)
class Settings:
    """What holds for all ratings of a file: what the sides are called, the scales that are asked for, the seed of the order."""

    label_a: str
    label_b: str
    scales: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Asked:
    """A question as a rater sees it: not which side is which, nor whether it is gold."""

    id: str
    prompt: PromptText
    left: str
    right: str


@dataclass(frozen=True)
class Progress:
    """Where a rater stands."""

    rater: str
    done: int
    total: int
    last: str | None
    """The client id of the latest rating, which can be undone."""
    question: Asked | None
    """The next question; None: all are rated."""


@dataclass(frozen=True)
class Judgement:
    """One rating, in terms of the sides."""

    rater: str
    question: RatingQuestion
    choice: Choice
    a_left: bool
    """Whether A stood on the left."""
    marks: Marks | None
    """Side ("a", "b") -> scale -> 1 to 5."""


class Store:
    """The ratings file, for many threads.

    What rates (``join`` to ``undo``) raises sqlite3.Error where the disk is full or gone; what reads it all raises DataError
    where the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open an existing file; raises as ``open_database``."""
        self._connection = open_database(path)
        self._lock = threading.Lock()
        self._path = path
        meta = {key: json.loads(value) for key, value in self._read("SELECT key, value FROM meta")}
        self.token: str = meta["token"]
        self.database: str = meta["database"]
        self.settings = Settings(meta["label_a"], meta["label_b"], tuple(meta["scales"]), meta["seed"])

    @classmethod
    def create(cls, path: Path, questions: Sequence[RatingQuestion], settings: Settings) -> Store:
        """Make the file with its questions, in one transaction, readable by its owner alone (it holds the page's token).

        Raises RunError where the file can't be written, DataError where something else lies there.
        """
        meta = {"token": secrets.token_urlsafe(32), "database": secrets.token_hex(8), **vars(settings)}
        with database_errors(path, *NAMED):
            path.touch(mode=0o600)
            with closing(connect(path)) as connection:
                if has_tables(connection):
                    raise DataError(f"{path} holds another database; choose a new name with --db.")
                connection.execute("PRAGMA journal_mode = WAL")
                with transaction(connection):
                    for statement in Path(__file__).with_name("schema.sql").read_text(encoding="utf-8").split(";\n"):
                        connection.execute(statement)
                    rows = [(key, json.dumps(value)) for key, value in meta.items()]
                    connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                    asked = [
                        (one.id, number, json.dumps(one.prompt, ensure_ascii=False), one.a, one.b, one.gold)
                        for number, one in enumerate(questions)
                    ]
                    connection.executemany("INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?)", asked)
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                    connection.execute(f"PRAGMA application_id = {APPLICATION}")
        return cls(path)

    def close(self) -> None:
        """Close the file; its log is folded into it."""
        with self._lock:
            self._connection.close()

    # ---- raters ----

    def join(self, name: str) -> Progress:
        """Let a rater in, new or known (upper and lower case make no difference); raises DataError for no usable name."""
        shown = rater_name(name)
        key = shown.casefold()
        with self._lock, transaction(self._connection):
            if self._rater(key) is None:
                added = self._connection.execute(
                    "INSERT INTO raters (key, name, created) VALUES (?, ?, ?)", (key, shown, _now())
                )
                ids = [row[0] for row in self._connection.execute("SELECT id FROM questions")]
                order = enumerate(draw_order(self.settings.seed, key, ids))
                self._connection.executemany(
                    "INSERT INTO orders VALUES (?, ?, ?, ?)",
                    [(added.lastrowid, place, question, left) for place, (question, left) in order],
                )
            return self._progress(key)

    def progress(self, name: str) -> Progress | None:
        """Say where a rater stands; None: nobody of that name."""
        key = name.casefold()
        with self._lock:
            return None if self._rater(key) is None else self._progress(key)

    # ---- ratings ----

    def rate(self, name: str, question: str, choice: Shown, client_id: str, marks: Marks | None = None) -> Outcome:
        """Keep a rating. The same message sent again changes nothing; nor does one that was undone since.

        ``marks`` are by side as shown, ``left`` and ``right``. On return with ``done`` the rating is on the disk.
        """
        with self._lock, transaction(self._connection):
            rater = self._rater(name.casefold())
            asked = self._one("SELECT a_left FROM orders WHERE rater = ? AND question = ?", rater, question)
            if asked is None:
                return "unknown"
            sides = {"left": "a", "right": "b"} if asked[0] else {"left": "b", "right": "a"}
            kept = sides.get(choice, choice)
            row = self._one("SELECT rater, question, choice FROM ratings WHERE client_id = ?", client_id)
            if row is not None:
                return "before" if row == (rater, question, kept) else "conflict"
            if self._one("SELECT 1 FROM undone WHERE client_id = ?", client_id):
                return "undone"
            if self._one("SELECT 1 FROM ratings WHERE rater = ? AND question = ?", rater, question):
                return "conflict"
            by_side = None if marks is None else json.dumps({sides[side]: dict(marks[side]) for side in sides})
            self._connection.execute(
                "INSERT INTO ratings (rater, question, choice, scales, client_id, created) VALUES (?, ?, ?, ?, ?, ?)",
                (rater, question, kept, by_side, client_id, _now()),
            )
        return "done"

    def undo(self, name: str, client_id: str) -> Outcome:
        """Take a rater's latest rating back; its question is the next one again, and the rating is kept aside."""
        with self._lock, transaction(self._connection):
            rater = self._rater(name.casefold())
            gone = self._one("SELECT rater FROM undone WHERE client_id = ?", client_id)
            if gone is not None:
                return "before" if gone[0] == rater else "unknown"
            last = self._one("SELECT client_id FROM ratings WHERE rater = ? ORDER BY id DESC LIMIT 1", rater)
            if last is None or last[0] != client_id:
                return "unknown" if last is None else "conflict"
            self._connection.execute(
                "INSERT INTO undone SELECT client_id, rater, question, choice, scales, created, ? FROM ratings "
                "WHERE client_id = ?",
                (_now(), client_id),
            )
            self._connection.execute("DELETE FROM ratings WHERE client_id = ?", (client_id,))
        return "done"

    # ---- reading ----

    def questions(self) -> list[RatingQuestion]:
        """All questions, gold ones too, in the files' order."""
        return [_question(*row) for row in self._read("SELECT prompt, a, b, gold FROM questions ORDER BY number")]

    def judgements(self) -> list[Judgement]:
        """All ratings that stand, in the order in which they were made."""
        rows = self._read(
            "SELECT raters.name, choice, a_left, scales, prompt, a, b, gold FROM ratings "
            "JOIN raters ON raters.id = ratings.rater JOIN questions ON questions.id = ratings.question "
            "JOIN orders ON orders.rater = ratings.rater AND orders.question = ratings.question ORDER BY ratings.id"
        )
        return [
            Judgement(name, _question(*question), choice, bool(a_left), None if scales is None else json.loads(scales))
            for name, choice, a_left, scales, *question in rows
        ]

    def _read(self, query: str) -> list[tuple[Any, ...]]:
        with database_errors(self._path, *NAMED), self._lock:
            return self._connection.execute(query).fetchall()

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
        return row

    def _rater(self, key: str) -> int | None:
        row = self._one("SELECT id FROM raters WHERE key = ?", key)
        return None if row is None else int(row[0])

    def _progress(self, key: str) -> Progress:
        rater, name, total, done, last = self._connection.execute(
            "SELECT id, name, (SELECT count(*) FROM orders WHERE rater = raters.id), "
            "(SELECT count(*) FROM ratings WHERE rater = raters.id), "
            "(SELECT client_id FROM ratings WHERE rater = raters.id ORDER BY id DESC LIMIT 1) FROM raters WHERE key = ?",
            (key,),
        ).fetchone()
        row = self._one(
            "SELECT questions.id, prompt, a, b, a_left FROM orders JOIN questions ON questions.id = orders.question "
            "LEFT JOIN ratings ON ratings.rater = orders.rater AND ratings.question = orders.question "
            "WHERE orders.rater = ? AND ratings.id IS NULL ORDER BY place LIMIT 1",
            rater,
        )
        asked = None
        if row is not None:
            question, prompt, a, b, a_left = row
            asked = Asked(question, json.loads(prompt), *((a, b) if a_left else (b, a)))
        return Progress(name, done, total, last, asked)


def draw_order(seed: int, rater: str, questions: Sequence[str]) -> list[tuple[str, bool]]:
    """Shuffle the questions' names for a rater and draw whether A stands on the left: ``(question, A is on the left)`` each.

    The draw hangs on nothing but seed, rater and name: it is the same on every machine and for every order of ``questions``.
    """
    # 256 random bits each: the first ones place the question, the last one places its answers.
    drawn = sorted((hashlib.sha256(f"{seed}\0{one}\0{rater}".encode()).digest(), one) for one in questions)
    return [(question, bool(digest[-1] & 1)) for digest, question in drawn]


def rater_name(name: str) -> str:
    """Bring a name to one form: no white space around or doubled, no invisible characters.

    Raises DataError where it is empty or longer than 40 characters.
    """
    text = unicodedata.normalize("NFC", " ".join(name.split()))
    text = "".join(char for char in text if unicodedata.category(char)[0] != "C")
    if not 1 <= len(text) <= 40:
        raise DataError("A name of 1 to 40 characters is needed.")
    return text


def open_database(path: Path) -> sqlite3.Connection:
    """Open a ratings file, for one thread at a time.

    Every commit waits until the log is on the disk (``synchronous = FULL``), so that neither a kill nor a power cut takes
    back what was confirmed. Raises DataError where it is no file of ours, or of a later cagsr, RunError where it can't be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such ratings file; cagsr rate serve makes one (--db names it).")
    with database_errors(path, *NAMED):
        connection = connect(path)
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise DataError(f"{path} is no ratings file of cagsr rate; choose another one with --db.")
            if connection.execute("PRAGMA user_version").fetchone()[0] > VERSION:
                raise DataError(f"{path} comes from a later version of cagsr; choose another one with --db.")
        except (sqlite3.Error, DataError):
            connection.close()
            raise
    return connection


def was_created(path: Path) -> bool:
    """Whether a ratings file is there; what a kill left of its making (an empty database) is none."""
    if not path.exists():
        return False
    with database_errors(path, *NAMED), closing(connect(path)) as connection:
        return has_tables(connection)


def _question(prompt: str, a: str, b: str, gold: int) -> RatingQuestion:
    return RatingQuestion(json.loads(prompt), a, b, bool(gold))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
