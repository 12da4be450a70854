"""Questions from files of answers and of pairs, and the order in which they are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cagsr.errors import DataError
from cagsr.rating.rating_questions import (
    RatingQuestion,
    questions_from_answers,
    questions_from_pairs,
    with_gold,
)
from cagsr.rating.store import draw_order

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answers(path: Path, *pairs: tuple[Any, Any]) -> str:
    return write(path, [{"prompt": prompt, "completion": text, "tokens": 3, "ended": True} for prompt, text in pairs])


def test_answers_are_paired_by_prompt_and_place(tmp_path: Path) -> None:
    a = answers(tmp_path / "a.jsonl", ("one", "a1"), ("two", "a2"), ("one", "a3"))
    b = answers(tmp_path / "b.jsonl", ("two", "b2"), ("one", "b1"), ("one", "b3"))
    found = questions_from_answers(a, b)
    assert found.questions == (
        RatingQuestion("one", "a1", "b1"),
        RatingQuestion("one", "a3", "b3"),
        RatingQuestion("two", "a2", "b2"),
    )
    assert found.notes() == []


def test_what_is_not_asked_is_counted(tmp_path: Path) -> None:
    a = answers(
        tmp_path / "a.jsonl", ("one", "same  text"), ("two", "x"), ("two", "x"), ("three", ""), ("three", "more")
    )
    b = answers(tmp_path / "b.jsonl", ("one", "same text "), ("two", "y"), ("two", "y"), ("three", "z"))
    found = questions_from_answers(a, b)
    assert found.questions == (RatingQuestion("two", "x", "y"), RatingQuestion("three", "", "z"))
    assert (found.equal, found.repeated, found.unpaired) == (1, 1, 1)
    assert len(found.notes()) == 3


def test_chat_messages_are_prompts_in_every_form(tmp_path: Path) -> None:
    parts = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]}]
    a = answers(tmp_path / "a.jsonl", (CHAT, "yes"))
    b = answers(tmp_path / "b.jsonl", (parts, [{"role": "assistant", "content": "no"}]))
    assert questions_from_answers(a, b).questions == (RatingQuestion(CHAT, "yes", "no"),)


def test_pairs_and_gold_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "p", "a": "x", "b": "y"}, {"prompt": "p", "a": "y", "b": "x"}])
    gold = write(tmp_path / "g.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y"}])
    both = with_gold(
        questions_from_pairs(path, "a", "b"), questions_from_pairs(gold, "chosen", "rejected", gold=True)
    ).questions
    assert both == (
        RatingQuestion("p", "x", "y"),
        RatingQuestion("p", "y", "x"),
        RatingQuestion("p", "x", "y", gold=True),
    )
    assert len({one.id for one in both}) == 3


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"completion": "x"}, r"a\.jsonl, row 1: no prompt in column 'prompt' \(columns here: completion\)"),
        ({"prompt": " ", "completion": "x"}, "row 1: no prompt"),
        ({"prompt": [], "completion": "x"}, "row 1: column 'prompt' must hold"),
        ({"prompt": True, "completion": "x"}, "row 1: column 'prompt' must hold"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "row 1: message 1 of the prompt needs"),
        ({"prompt": ["hello"], "completion": "x"}, "row 1: message 1 of the prompt needs"),
        ({"prompt": "p"}, r"row 1: no answer in column 'completion' \(columns here: prompt\).*--response_column"),
        ({"prompt": "p", "completion": True}, "row 1: column 'completion': Expected text"),
        ({"prompt": "p", "completion": "\ud800x"}, "row 1: column 'completion' holds half a surrogate pair"),
        ({"prompt": "other", "completion": "x"}, r"row 1: its prompt is not answered in .*b\.jsonl"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    a, b = write(tmp_path / "a.jsonl", [row]), answers(tmp_path / "b.jsonl", ("p", "y"))
    with pytest.raises(DataError, match=sentence):
        questions_from_answers(a, b)


def test_a_prompt_that_only_b_answers_is_refused_and_equal_gold_answers_are_left_out(tmp_path: Path) -> None:
    a, b = answers(tmp_path / "a.jsonl", ("p", "x")), answers(tmp_path / "b.jsonl", ("p", "y"), ("q", "y"))
    with pytest.raises(DataError, match=r"b\.jsonl, row 2: its prompt is not answered in .*a\.jsonl"):
        questions_from_answers(a, b)
    rows = [{"prompt": "p", "chosen": "x", "rejected": "x "}, {"prompt": "p", "chosen": "x", "rejected": "y"}]
    found = questions_from_pairs(write(tmp_path / "g.jsonl", rows), "chosen", "rejected", gold=True)
    assert found.questions == (RatingQuestion("p", "x", "y", gold=True),)
    assert found.notes() == ["1 pairs have two equal answers: they are not asked and count nowhere."]


def test_the_order_is_a_draw_by_seed_rater_and_question() -> None:
    names = [RatingQuestion(f"prompt {number}", "x", "y").id for number in range(400)]
    order = draw_order(0, "ada", names)
    assert sorted(name for name, _ in order) == sorted(names)
    assert order == draw_order(0, "ada", names[::-1])
    for other in (draw_order(1, "ada", names), draw_order(0, "bob", names)):
        assert [name for name, _ in other] != [name for name, _ in order]
        differ = sum(dict(other)[name] != left for name, left in order)
        assert 140 < differ < 260  # one half, six standard deviations either way
    first, second = sum(left for _, left in order[:200]), sum(left for _, left in order[200:])
    assert 58 < first < 142
    assert 58 < second < 142  # the side hangs on no place in the order
