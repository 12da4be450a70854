"""What may be done with the ratings: find a rater, give the next question, keep a rating once and once only, undo."""

from __future__ import annotations

import hashlib
import json
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cagsr.errors import DataError
from cagsr.rating.database import create_database, database_errors, open_database, transaction
from cagsr.rating.rating_questions import PromptText, RatingQuestion

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
    """What holds for all ratings of a file."""

    label_a: str
    """What side A is, for the summary."""
    label_b: str
    scales: tuple[str, ...]
    """Scales that are asked for."""
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
        """Make a new file; raises as ``create_database``."""
        create_database(path, questions, vars(settings) | {"scales": list(settings.scales)})
        return cls(path)

    def close(self) -> None:
        """Close the file; its log is folded into it."""
        with self._lock:
            self._connection.close()

    # ---- raters ----

    def join(self, name: str) -> Progress:
        """Let a rater in, new or known (upper and lower case make no difference).

        Raises:
            DataError: no usable name.
        """
        shown = rater_name(name)
        key = shown.casefold()
        with self._lock, transaction(self._connection):
            if self._rater(key) is None:
                cursor = self._connection.execute(
                    "INSERT INTO raters (key, name, created) VALUES (?, ?, ?)", (key, shown, _now())
                )
                ids = [row[0] for row in self._connection.execute("SELECT id FROM questions")]
                order = draw_order(self.settings.seed, key, ids)
                self._connection.executemany(
                    "INSERT INTO orders VALUES (?, ?, ?, ?)",
                    [(cursor.lastrowid, place, question, left) for place, (question, left) in enumerate(order)],
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
            asked = self._connection.execute(
                "SELECT a_left FROM orders WHERE rater = ? AND question = ?", (rater, question)
            ).fetchone()
            if asked is None:
                return "unknown"
            sides = {"left": "a", "right": "b"} if asked[0] else {"left": "b", "right": "a"}
            kept = sides.get(choice, choice)
            row = self._connection.execute(
                "SELECT rater, question, choice FROM ratings WHERE client_id = ?", (client_id,)
            ).fetchone()
            if row is not None:
                return "before" if row == (rater, question, kept) else "conflict"
            if self._connection.execute("SELECT 1 FROM undone WHERE client_id = ?", (client_id,)).fetchone():
                return "undone"
            if self._connection.execute(
                "SELECT 1 FROM ratings WHERE rater = ? AND question = ?", (rater, question)
            ).fetchone():
                return "conflict"
            scales = (
                None if marks is None else json.dumps({sides[side]: dict(marks[side]) for side in ("left", "right")})
            )
            self._connection.execute(
                "INSERT INTO ratings (rater, question, choice, scales, client_id, created) VALUES (?, ?, ?, ?, ?, ?)",
                (rater, question, kept, scales, client_id, _now()),
            )
        return "done"

    def undo(self, name: str, client_id: str) -> Outcome:
        """Take a rater's latest rating back; its question is the next one again, and the rating is kept aside."""
        with self._lock, transaction(self._connection):
            rater = self._rater(name.casefold())
            gone = self._connection.execute("SELECT rater FROM undone WHERE client_id = ?", (client_id,)).fetchone()
            if gone is not None:
                return "before" if gone[0] == rater else "unknown"
            last = self._connection.execute(
                "SELECT client_id FROM ratings WHERE rater = ? ORDER BY id DESC LIMIT 1", (rater,)
            ).fetchone()
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
        with database_errors(self._path), self._lock:
            return self._connection.execute(query).fetchall()

    def _rater(self, key: str) -> int | None:
        row = self._connection.execute("SELECT id FROM raters WHERE key = ?", (key,)).fetchone()
        return None if row is None else int(row[0])

    def _progress(self, key: str) -> Progress:
        rater, name = self._connection.execute("SELECT id, name FROM raters WHERE key = ?", (key,)).fetchone()
        total, done, last = self._connection.execute(
            "SELECT (SELECT count(*) FROM orders WHERE rater = :rater), (SELECT count(*) FROM ratings WHERE rater = :rater), "
            "(SELECT client_id FROM ratings WHERE rater = :rater ORDER BY id DESC LIMIT 1)",
            {"rater": rater},
        ).fetchone()
        row = self._connection.execute(
            "SELECT questions.id, prompt, a, b, a_left FROM orders JOIN questions ON questions.id = orders.question "
            "LEFT JOIN ratings ON ratings.rater = orders.rater AND ratings.question = orders.question "
            "WHERE orders.rater = ? AND ratings.id IS NULL ORDER BY place LIMIT 1",
            (rater,),
        ).fetchone()
        asked = None
        if row is not None:
            question, prompt, a, b, a_left = row
            asked = Asked(question, json.loads(prompt), *((a, b) if a_left else (b, a)))
        return Progress(name, done, total, last, asked)


def draw_order(seed: int, rater: str, questions: Sequence[str]) -> list[tuple[str, bool]]:
    """Shuffle the questions' names for a rater and draw whether A stands on the left, each independently.

    The draw hangs on nothing but seed, rater and name: it is the same on every machine and for every order of ``questions``.

    Returns:
        ``(question, A is on the left)`` in the order in which they are asked.
    """
    # 256 random bits each: the first ones place the question, the last one places its answers.
    drawn = sorted((hashlib.sha256(f"{seed}\0{one}\0{rater}".encode()).digest(), one) for one in questions)
    return [(question, bool(digest[-1] & 1)) for digest, question in drawn]


def rater_name(name: str) -> str:
    """Bring a name to one form: no white space around or doubled, no invisible characters.

    Raises:
        DataError: it is empty or longer than 40 characters.
    """
    text = unicodedata.normalize("NFC", " ".join(name.split()))
    text = "".join(char for char in text if unicodedata.category(char)[0] != "C")
    if not 1 <= len(text) <= 40:
        raise DataError("A name of 1 to 40 characters is needed.")
    return text


def _question(prompt: str, a: str, b: str, gold: int) -> RatingQuestion:
    return RatingQuestion(json.loads(prompt), a, b, bool(gold))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
