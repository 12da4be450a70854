"""Machine-made wrong answers: each kind makes its mistake and no other, from text alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cagsr.commands.main import main
from cagsr.config import CorruptionConfig
from cagsr.errors import DataError
from cagsr.preferences.corrupt import KINDS, SupervisedPair, clauses, synthesize

DISHES, TOWNS, PRICES = ("soup", "fish", "cake", "stew"), ("Aberdeen", "Bristol", "Cardiff", "Dover"), ("low", "high")
PAIRS = [
    SupervisedPair(
        f"dish: {dish}; town: {town}; price: {price}",
        f" You get {dish} in {town}, at a {price} price. It is said to be good.",
    )
    for dish in DISHES
    for town in TOWNS
    for price in PRICES
]
ONLY_ZERO = dict.fromkeys(asdict(CorruptionConfig()), 0.0)


def only(kind: str, pairs: list[SupervisedPair] = PAIRS, seed: int = 0) -> list[dict[str, Any]]:
    rows, _ = synthesize(pairs, CorruptionConfig(**{**ONLY_ZERO, kind: 1.0}), seed)
    assert len(rows) == len(pairs)
    assert {row["corruption"] for row in rows} == {kind}
    return rows


def said(text: str) -> set[str]:
    """The values of the little world that a text says."""
    words = {word.strip(".,") for word in text.split()}
    return words & {*DISHES, *TOWNS, *PRICES}


def plain_words(text: str) -> list[str]:
    return [word.strip(".,") for word in text.split()]


def test_clauses_end_at_punctuation_and_begin_at_connecting_words() -> None:
    text = "You get soup in Dover, at a low price. It is good"
    assert [text[a:b] for a, b in clauses(text)] == ["You get soup", "in Dover,", "at a low price.", "It is good"]
    text = "Hier, wo es Suppe gibt; dort nicht."
    assert [text[a:b] for a, b in clauses(text)] == ["Hier,", "wo es Suppe gibt;", "dort nicht."]
    assert clauses("") == []
    assert clauses("innkeeper") == [(0, 9)]  # "in" is no word of its own here


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_pair_and_changes_the_answer(kind: str) -> None:
    for row in only(kind):
        pair = next(pair for pair in PAIRS if pair.prompt == row["prompt"])
        assert row["chosen"] == pair.completion
        assert row["rejected"].startswith(" ")
        assert not row["rejected"].startswith("  ")
        assert " ".join(row["rejected"].split()) != " ".join(row["chosen"].split())


def test_a_dropped_fact_is_gone_and_nothing_else() -> None:
    for row in only("drop"):
        assert len(said(row["rejected"])) == 2
        assert said(row["rejected"]) < said(row["chosen"])
        assert not Counter(plain_words(row["rejected"])) - Counter(plain_words(row["chosen"]))


def test_a_swapped_fact_has_another_prompts_value_of_the_same_kind() -> None:
    for row in only("swap"):
        gone, new = said(row["chosen"]) - said(row["rejected"]), said(row["rejected"]) - said(row["chosen"])
        assert len(gone) == len(new) == 1
        kind = next(kind for kind in (DISHES, TOWNS, PRICES) if gone <= set(kind))
        assert new <= set(kind)
        assert row["rejected"].replace(*new, *gone) == row["chosen"]


def test_an_invented_fact_comes_on_top() -> None:
    for row in only("invent"):
        assert said(row["rejected"]) > said(row["chosen"])
        words = iter(plain_words(row["rejected"]))
        assert all(word in words for word in plain_words(row["chosen"]))  # in this order


def test_repetition_says_a_phrase_twice_in_a_row() -> None:
    for row in only("repeat"):
        extra = len(row["rejected"].split()) - len(row["chosen"].split())
        assert 2 <= extra <= 6
        plain = plain_words(row["rejected"])
        assert any(plain[i : i + extra] == plain[i + extra : i + 2 * extra] for i in range(len(plain)))


def test_truncation_is_a_beginning() -> None:
    for row in only("truncate"):
        assert row["chosen"].startswith(row["rejected"])
        assert len(row["rejected"].split()) >= len(row["chosen"].split()) // 3


def test_another_prompts_answer_is_one_of_the_files_and_not_of_this_prompt() -> None:
    twice = [*PAIRS, *(SupervisedPair(pair.prompt, pair.completion + " Really.") for pair in PAIRS)]
    for row in only("other", twice):
        assert row["rejected"] in {pair.completion for pair in twice if pair.prompt != row["prompt"]}


def test_weights_counts_and_seeds() -> None:
    rows, failed = synthesize(PAIRS, CorruptionConfig(repeat=0, other=8), 1, 200)
    kinds = Counter(row["corruption"] for row in rows)
    assert (len(rows), failed) == (200, 0)
    assert "repeat" not in kinds
    assert kinds["other"] > 80
    assert len({(row["prompt"], row["rejected"]) for row in rows}) == 200
    assert synthesize(PAIRS, CorruptionConfig(), 3) == synthesize(PAIRS, CorruptionConfig(), 3)
    assert synthesize(PAIRS, CorruptionConfig(), 3) != synthesize(PAIRS, CorruptionConfig(), 4)


def test_pairs_that_allow_few_mistakes_or_none() -> None:
    alone = [SupervisedPair("say hello to Ann", "Hello Ann, how are you today?")]
    rows, _ = synthesize(alone, CorruptionConfig(), 0, 1000)
    assert {row["corruption"] for row in rows} <= {"drop", "repeat", "truncate"}
    assert len(rows) < 1000  # it stops when it only repeats itself
    with pytest.raises(DataError, match="No pair allows"):
        synthesize([SupervisedPair("a", "b")], CorruptionConfig(), 0)


def test_conversations_stay_conversations() -> None:
    chats = [
        SupervisedPair(
            [{"role": "user", "content": pair.prompt}], [{"role": "assistant", "content": pair.completion.strip()}]
        )
        for pair in PAIRS
    ]
    rows, _ = synthesize(chats, CorruptionConfig(), 0)
    for row in rows:
        assert [message["role"] for message in row["rejected"]] == ["assistant"]
        assert row["rejected"] != row["chosen"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "preferences.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": pair.prompt, "completion": pair.completion}) + "\n" for pair in PAIRS)
    )
    words = ["synthesize", "--data", str(data), "--output", str(output)]
    assert main([*words, "--num_pairs", "20", "--corruption.other", "0", "--seed", "3"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 20
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "corruption"}
    assert "20 pairs" in capsys.readouterr().err
    assert main([*words, "--completion_column", "answer"]) == 2
    assert "pairs.jsonl, row 1: no column 'answer'" in capsys.readouterr().err
    data.write_text('{"prompt": "a", "completion": " "}\n')
    assert main(words) == 2
    assert "row 1: column 'completion' is empty" in capsys.readouterr().err
