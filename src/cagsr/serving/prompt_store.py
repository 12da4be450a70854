"""Prompts that users let the server keep, with the answers they got: SQLite with a write-ahead log, within a size limit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cagsr.errors import DataError
from cagsr.serving.settings import ConsentConfig
from cagsr.support.database import connect, database_errors, has_tables, transaction

FILE = "prompts.sqlite"
APPLICATION = 0x63616770
"""What SQLite's header says of files that are ours ("cagp")."""
VERSION = 1
HELD_OUT = 5
"""One in so many prompts is never trained on: new versions are compared on it."""
NAMED = ("file of kept prompts", "--folder")

PromptText = str | list[dict[str, Any]]
"""A prompt as it was sent: text, or chat messages."""


@dataclass(frozen=True)
class KeptPrompt:
    """A prompt that somebody let the server keep."""

    id: int
    prompt: PromptText
    held_out: bool
    created: str
    answers: int
    """How many answers to it are kept."""


@dataclass(frozen=True)
class RatedAnswer:
    """An answer that somebody gave a thumb."""

    prompt: PromptText
    answer: str
    thumb: int  # 1: up; -1: down


class PromptStore:
    """The file of kept prompts, for many threads and processes.

    What ``keep`` has returned is on the disk. Beyond the limits the oldest prompts go, with their answers. Methods raise
    RunError where the file can't be used, DataError where it is none of ours.
    """

    def __init__(self, path: Path, limits: ConsentConfig, *, hold_out: bool = True) -> None:
        """Open the file, made where there is none yet, readable by its owner alone.

        ``hold_out``: some of the prompts kept from now on are never trained on.
        """
        self._path, self._limits, self._lock = path, limits, threading.Lock()
        self._hold_out = hold_out
        with database_errors(path, *NAMED):
            path.touch(mode=0o600)
            self._connection = connect(path)
            self._connection.execute("PRAGMA secure_delete = ON")
            self._connection.execute("PRAGMA journal_mode = WAL")
            with transaction(self._connection):
                if not has_tables(self._connection):
                    for statement in Path(__file__).with_name("schema.sql").read_text(encoding="utf-8").split(";\n"):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {VERSION}")
                    self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
            if self._one("PRAGMA application_id") != (APPLICATION,):
                raise DataError(f"{path} is no file of kept prompts; choose another one with --folder.")
            if self._one("PRAGMA user_version") != (VERSION,):
                raise DataError(f"{path} comes from another version of cagsr; choose another one with --folder.")

    def close(self) -> None:
        """Close the file; its log is folded into it."""
        with self._lock:
            self._connection.close()

    def keep(self, prompt: PromptText) -> int:
        """Keep a prompt; on return it is on the disk. Gives its number. The oldest ones make room."""
        text = json.dumps(prompt, ensure_ascii=False)
        held_out = self._hold_out and is_held_out(text)
        with self._changing():
            added = self._connection.execute(
                "INSERT INTO prompts (prompt, held_out, bytes, created) VALUES (?, ?, ?, ?)",
                (text, held_out, len(text.encode()), datetime.now(UTC).isoformat(timespec="milliseconds")),
            )
            number = int(added.lastrowid or 0)
            self._make_room(number)
        return number

    def keep_answers(self, number: int, completion: str, answers: Sequence[str], version: int) -> None:
        """Keep what a prompt was answered, unless it was removed meanwhile."""
        with self._changing():
            if self._one("SELECT 1 FROM prompts WHERE id = ?", number) is None:
                return
            rows = [
                (completion, place, number, text, version, len(text.encode())) for place, text in enumerate(answers)
            ]
            self._connection.executemany(
                "INSERT INTO answers (completion, place, prompt, answer, version, bytes) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
            self._make_room(number)

    def rate(self, completion: str, place: int, thumb: int | None) -> bool:
        """Give an answer a thumb (1 up, -1 down, None: take it back); False where no such answer is kept."""
        with self._changing():
            done = self._connection.execute(
                "UPDATE answers SET thumb = ? WHERE completion = ? AND place = ?", (thumb, completion, place)
            )
            return done.rowcount == 1

    def remove(self, number: int) -> bool:
        """Remove a prompt with its answers, from the log too; False where there is none."""
        with self._changing():
            done = self._connection.execute("DELETE FROM prompts WHERE id = ?", (number,)).rowcount == 1
            if done:
                self._connection.execute("INSERT INTO removed VALUES (?)", (number,))
        if done:
            with database_errors(self._path, *NAMED), self._lock:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return done

    def removed(self, until: int) -> int:
        """How many prompts up to a number were removed by somebody (not to make room)."""
        [(count,)] = self._read("SELECT count(*) FROM removed WHERE id <= ?", until)
        return int(count)

    def prompts(self, after: int = 0, limit: int = -1) -> list[KeptPrompt]:
        """The kept prompts with a number above ``after``, the oldest first; at most ``limit``, -1: all."""
        rows = self._read(
            "SELECT id, prompt, held_out, created, (SELECT count(*) FROM answers WHERE prompt = prompts.id) "
            "FROM prompts WHERE id > ? ORDER BY id LIMIT ?",
            after,
            limit,
        )
        return [KeptPrompt(number, json.loads(text), bool(out), made, count) for number, text, out, made, count in rows]

    def counts(self, after: int = 0) -> Mapping[str, int]:
        """``prompts``, ``bytes``, ``last`` (the newest prompt's number), ``new`` ones to train on behind ``after``."""
        [(prompts, size, last, new)] = self._read(
            "SELECT count(*), coalesce(sum(bytes), 0) + (SELECT coalesce(sum(bytes), 0) FROM answers), coalesce(max(id), 0), "
            "count(CASE WHEN id > ? AND NOT held_out THEN 1 END) FROM prompts",
            after,
        )
        return {"prompts": prompts, "bytes": size, "last": last, "new": new}

    def rated(self) -> list[RatedAnswer]:
        """All answers with a thumb, by prompt and in the order of the completions' numbers."""
        rows = self._read(
            "SELECT prompts.prompt, answer, thumb FROM answers JOIN prompts ON prompts.id = answers.prompt "
            "WHERE thumb IS NOT NULL ORDER BY prompts.id, completion, place"
        )
        return [RatedAnswer(json.loads(text), answer, thumb) for text, answer, thumb in rows]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with database_errors(self._path, *NAMED), self._lock, transaction(self._connection):
            yield

    def _make_room(self, newest: int) -> None:
        """Remove the oldest prompts until the limits hold; the one that is being kept stays."""
        [count, size] = self._connection.execute(
            "SELECT (SELECT count(*) FROM prompts), "
            "(SELECT coalesce(sum(bytes), 0) FROM prompts) + (SELECT coalesce(sum(bytes), 0) FROM answers)"
        ).fetchone()
        while count > self._limits.prompts or size > self._limits.bytes:
            oldest = self._one(
                "SELECT id, bytes + (SELECT coalesce(sum(bytes), 0) FROM answers WHERE prompt = prompts.id) FROM prompts "
                "WHERE id != ? ORDER BY id LIMIT 1",
                newest,
            )
            if oldest is None:
                return
            self._connection.execute("DELETE FROM prompts WHERE id = ?", (oldest[0],))
            count, size = count - 1, size - oldest[1]

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with database_errors(self._path, *NAMED), self._lock:
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
        return row


def is_held_out(prompt: str) -> bool:
    """Whether a prompt (as JSON) is one of those that versions are compared on; the same prompt always falls alike."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % HELD_OUT == 0
