"""The ratings file: one rating a rater and question, whatever is sent again, and nothing else than what was sent."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import apart
from cagsr.errors import DataError, RunError
from cagsr.rating.rating_questions import RatingQuestion
from cagsr.rating.store import Settings, Store, open_database, rater_name, was_created

QUESTIONS = [RatingQuestion(f"prompt {number}", f"a {number}", f"b {number}") for number in range(6)]
SETTINGS = Settings("a.jsonl", "b.jsonl", (), 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "r.sqlite", QUESTIONS, SETTINGS)
    yield made
    made.close()


def side_of(asked: Any, answer: str) -> Any:
    return "left" if asked.left.startswith(answer) else "right"


def test_left_and_right_become_the_sides(store: Store) -> None:
    progress = store.join("Ada")
    expected = {}
    for number in range(6):
        asked = progress.question
        assert asked is not None
        assert {asked.left[0], asked.right[0]} == {"a", "b"}
        choice = side_of(asked, "a" if number % 2 else "b")
        expected[asked.prompt] = "a" if number % 2 else "b"
        marks = {"left": {"fluency": 1}, "right": {"fluency": 5}}
        assert store.rate("Ada", asked.id, choice, f"message-{number}", marks) == "done"
        found = store.progress("Ada")
        assert found is not None
        progress = found
        assert (progress.done, progress.last) == (number + 1, f"message-{number}")
    assert progress.question is None
    judged = store.judgements()
    assert {one.question.prompt: one.choice for one in judged} == expected
    assert all(one.marks is not None and one.marks["a"]["fluency"] == (1 if one.a_left else 5) for one in judged)
    assert len({one.a_left for one in judged}) == 2


def test_a_repeated_message_changes_nothing_and_another_one_is_a_conflict(store: Store) -> None:
    asked = store.join("Ada").question
    assert asked is not None
    assert store.rate("Ada", asked.id, "left", "message-1") == "done"
    assert store.rate("Ada", asked.id, "left", "message-1") == "before"
    assert store.rate("Ada", asked.id, "right", "message-1") == "conflict"
    assert store.rate("Ada", asked.id, "right", "message-2") == "conflict"
    assert store.rate("Ada", "nonsense", "left", "message-3") == "unknown"
    assert store.rate("Bob", asked.id, "left", "message-4") == "unknown"
    assert len(store.judgements()) == 1
    other = store.join("Bob").question
    assert other is not None
    assert store.rate("Bob", other.id, "left", "message-1") == "conflict"  # the id is Ada's


def test_undo_takes_back_the_last_one_only_and_late_copies_stay_undone(store: Store, tmp_path: Path) -> None:
    first = store.join("Ada").question
    assert first is not None
    store.rate("Ada", first.id, "tie", "message-1")
    second = store.progress("Ada").question  # type: ignore[union-attr]
    assert second is not None
    store.rate("Ada", second.id, "skip", "message-2")
    assert store.undo("Ada", "message-1") == "conflict"
    assert store.undo("Ada", "message-2") == "done"
    assert store.undo("Ada", "message-2") == "before"
    assert store.progress("Ada").question == second  # type: ignore[union-attr]
    assert store.rate("Ada", second.id, "skip", "message-2") == "undone"
    assert [one.choice for one in store.judgements()] == ["tie"]
    assert store.rate("Ada", second.id, "left", "message-3") == "done"
    store.join("Bob")
    assert store.undo("Bob", "message-3") == "unknown"
    # What was taken back is kept aside.
    rows = sqlite3.connect(tmp_path / "r.sqlite").execute("SELECT client_id, choice FROM undone").fetchall()
    assert rows == [("message-2", "skip")]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["rate", "again", "undo", "undo again", "reopen"]),
            st.sampled_from(["Ada", "Bob"]),
            st.sampled_from(["left", "right", "tie", "both_bad", "skip"]),
        ),
        max_size=25,
    )
)
def test_any_sequence_of_messages_gives_what_a_dictionary_gives(steps: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("db") / "r.sqlite"
    store = Store.create(path, QUESTIONS[:3], SETTINGS)
    stand: dict[str, list[tuple[Any, Any, str]]] = {"Ada": [], "Bob": []}
    sent: list[tuple[str, Any, Any, str]] = []
    for number, (what, name, choice) in enumerate(steps):
        progress = store.join(name)
        if what == "rate" and progress.question is not None:
            sent.append((name, progress.question, choice, f"message-{number}"))
            assert store.rate(name, progress.question.id, choice, f"message-{number}") == "done"
            stand[name].append(sent[-1][1:])
        elif what == "again" and sent:
            rater, question, kept, client = sent[number % len(sent)]
            outcome = store.rate(rater, question.id, kept, client)
            assert outcome == ("before" if (question, kept, client) in stand[rater] else "undone")
        elif what == "undo" and progress.last is not None:
            assert store.undo(name, progress.last) == "done"
            assert stand[name].pop()[2] == progress.last
        elif what == "undo again" and sent:
            rater, *_, client = sent[number % len(sent)]
            if client not in [message[2] for message in stand[rater]]:
                assert store.undo(rater, client) == "before"
        elif what == "reopen":
            store.close()
            store = Store(path)
        assert store.join(name).done == len(stand[name])
    found = {(one.rater, one.question.prompt): one for one in store.judgements()}
    assert len(found) == len(store.judgements()) == len(stand["Ada"]) + len(stand["Bob"])
    for name, messages in stand.items():
        for question, choice, _ in messages:
            one = found[name, question.prompt]
            shown = {"left": question.left[0], "right": question.right[0]}.get(choice, choice)
            assert one.choice == shown
    store.close()


def test_the_order_is_stored_and_raters_are_who_they_were(store: Store, tmp_path: Path) -> None:
    before = store.join("Ada Lovelace")
    assert store.join("  ada   LOVELACE ") == before
    assert before.rater == "Ada Lovelace"
    database = sqlite3.connect(tmp_path / "r.sqlite")
    order = database.execute("SELECT question, a_left FROM orders ORDER BY place").fetchall()
    assert len(order) == 6
    assert before.question is not None
    assert order[0] == (before.question.id, before.question.left.startswith("a"))
    for bad in ("", "   ", "\u200b", "x" * 41):
        with pytest.raises(DataError, match="1 to 40 characters"):
            rater_name(bad)


def test_what_was_confirmed_survives_a_kill(tmp_path: Path) -> None:
    """The process is killed right after each confirmation, without closing the file."""
    path = tmp_path / "r.sqlite"
    Store.create(path, QUESTIONS, SETTINGS).close()
    code = (
        "import os, pathlib, signal, sys; from cagsr.rating.store import Store; s = Store(pathlib.Path(sys.argv[1])); "
        "q = s.join('Ada').question; print(q.id, s.rate('Ada', q.id, 'tie', 'message-' + sys.argv[2]), flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    confirmed = []
    for number in range(2):
        with apart.python("-c", code, path, number) as run:
            assert run.wait() == -9, run.said
            confirmed.append(run.said.split())
    store = Store(path)
    assert [[one.question.id, "done"] for one in store.judgements()] == confirmed
    store.close()


def test_the_file_is_for_its_owner_and_uses_the_log(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    assert path.stat().st_mode & 0o777 == 0o600
    connection = open_database(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    connection.close()


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.sqlite: no such ratings file"):
        Store(tmp_path / "none.sqlite")
    text = tmp_path / "notes.txt"
    text.write_text("hello, this is no database at all" * 40)
    for act in (Store, was_created):
        with pytest.raises(DataError, match=r"notes\.txt is no ratings file"):
            act(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(DataError, match=r"other\.sqlite is no ratings file"):
        Store(other)
    with pytest.raises(DataError, match="holds another database"):
        Store.create(other, QUESTIONS, SETTINGS)
    with pytest.raises(RunError, match="can't be used"):
        Store.create(tmp_path / "no" / "folder.sqlite", QUESTIONS, SETTINGS)
    # What a kill leaves of the very first moment is no ratings file, and is taken up.
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    assert not was_created(empty)
    Store.create(empty, QUESTIONS, SETTINGS).close()
    assert was_created(empty)


def test_odd_texts_come_back_as_they_were(tmp_path: Path) -> None:
    odd = RatingQuestion(
        [{"role": "user", "content": "\x00\u202e</script>🐱\r\n"}], "\x00'; DROP TABLE ratings; --", ""
    )
    store = Store.create(tmp_path / "r.sqlite", [odd], SETTINGS)
    assert store.questions() == [odd]
    asked = store.join("Robert'); DROP TABLE raters; --").question
    assert asked is not None
    assert {asked.left, asked.right} == {odd.a, odd.b}
    assert json.dumps(asked.prompt) == json.dumps(odd.prompt)
    store.close()
