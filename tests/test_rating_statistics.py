"""Win rate, agreement, marks and the export, by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest

from cagsr.rating.export import preference_pairs
from cagsr.rating.rating_questions import RatingQuestion
from cagsr.rating.store import Judgement, Settings
from cagsr.rating.summary import SCORES, Agreement, agreement, choice_agreement, prompt_means, summarize

SETTINGS = Settings("a.jsonl", "b.jsonl", (), 0)
Q = [RatingQuestion(f"prompt {number}", f"a {number}", f"b {number}") for number in range(10)]


def judged(rater: str, choices: Iterable[str], questions: list[RatingQuestion] = Q, **more: Any) -> list[Judgement]:
    """Choices of a rater on the questions in their order; "-" for a question not rated."""
    names = {"-": None, "=": "tie", "x": "both_bad", "s": "skip"}
    found = [(question, names.get(one, one)) for question, one in zip(questions, choices, strict=False)]
    return [
        Judgement(rater, question, one, more.get("a_left", True), more.get("marks"))  # type: ignore[arg-type]
        for question, one in found
        if one is not None
    ]


def test_the_win_rate_is_a_mean_over_prompts() -> None:
    """Prompt 0: two raters, 1 and 0.5, and a second question with 0: (0.75 + 0) / 2; prompt 1: 1; prompt 2: skipped only."""
    second = RatingQuestion("prompt 0", "another a", "another b")
    judgements = [*judged("ada", "aas"), *judged("bob", "=--"), *judged("ada", "b", [second])]
    assert prompt_means(judgements, lambda one: SCORES.get(one.choice)).tolist() == [0.375, 1.0]
    found = summarize(judgements, 4, SETTINGS)
    assert found.prompts == 2
    assert found.win_rate is not None
    assert found.win_rate.mean == 0.6875
    assert (found.win_rate.low, found.win_rate.high) == (0.375, 1.0)  # means of two draws from these two, 95 % of them
    assert found.counts == {"a": 2, "b": 1, "tie": 1, "both_bad": 0, "skip": 1}
    assert summarize([], 4, SETTINGS).win_rate is None
    assert summarize(judged("ada", "ss"), 4, SETTINGS).win_rate is None


def test_both_bad_and_tie_count_half() -> None:
    assert prompt_means(judged("ada", "=xab"), lambda one: SCORES.get(one.choice)).tolist() == [0.5, 0.5, 1.0, 0.0]


def test_alpha_of_two_raters_by_hand() -> None:
    """Ten units, four in each of the values, agreeing in eight (the formula of Krippendorff 2004, 11.3).

    Ada: a a a a b b b b = =; Bob: a a a b b b b b = a. Coincidences: a-a 6, b-b 8, =-= 2, a-b 2, a-= 2.
    n_a = 4 + 4 = 8, n_b = 4 + 5 = 9, n_= = 2 + 1 = 3, n = 20. Observed disagreement 4 / 20.
    Expected: 1 - (8 * 7 + 9 * 8 + 3 * 2) / (20 * 19) = 1 - 134 / 380 = 246 / 380. Alpha = 1 - 0.2 * 380 / 246.
    """
    judgements = [*judged("ada", "aaaabbbb=="), *judged("bob", "aaabbbbb=a")]
    found = choice_agreement(judgements)
    alpha, shared = found.alpha, found.shared
    assert shared == 10
    assert alpha == pytest.approx(1 - 0.2 * 380 / 246, abs=1e-12)
    # What one of them has not rated, or skipped, is no unit and changes nothing.
    more = [*judged("ada", "aaaabbbb==ab", [*Q, RatingQuestion("p", "x", "y"), RatingQuestion("q", "x", "y")])]
    more += judged("bob", "aaabbbbb=as", [*Q, RatingQuestion("p", "x", "y")])
    assert choice_agreement(more) == Agreement(pytest.approx(alpha, abs=1e-12), 10)


def test_alpha_at_its_ends() -> None:
    assert choice_agreement([*judged("ada", "abab"), *judged("bob", "abab")]).alpha == pytest.approx(1.0)
    assert choice_agreement([*judged("ada", "ab"), *judged("bob", "ba")]).alpha == pytest.approx(-0.5)  # 1 - 1 / (2/3)
    assert choice_agreement(judged("ada", "abab")) == Agreement(None, 0)
    assert choice_agreement([*judged("ada", "aa"), *judged("bob", "aa")]) == Agreement(None, 2)
    # Ordinal: a near miss counts less than a far one.
    near = [("ada", unit, value) for unit, value in enumerate([1, 2, 3, 4, 5])]
    off = [
        agreement([*near, *(("bob", unit, value) for unit, value in enumerate(marks))], "ordinal").alpha
        for marks in ([1, 2, 3, 4, 4], [1, 2, 3, 4, 1])
    ]
    assert off[0] is not None
    assert off[1] is not None
    assert off[0] > off[1]


def test_gold_counts_for_raters_alone() -> None:
    gold = [RatingQuestion(f"gold {number}", "right", "wrong", gold=True) for number in range(4)]
    judgements = [*judged("ada", "ab"), *judged("ada", "ab=s", gold, a_left=False), *judged("bob", "-a")]
    found = summarize(judgements, 10, SETTINGS)
    assert found.counts["a"] == 2
    assert found.prompts == 2
    ada, bob = found.raters
    assert (ada.gold_right, ada.gold_answered, ada.counts["a"]) == (1, 3, 1)
    assert (bob.gold_right, bob.gold_answered) == (0, 0)
    # a was left twice (chosen once), right twice (chosen once): left 1 of 2, and of the gold ones 1 of 2.
    assert ada.left_share == 0.5
    assert found.agreement.shared == 1
    text = found.text()
    assert "gold 1 of 3 right" in text
    assert "few prompts" in text
    json.dumps(asdict(found), allow_nan=False)


def test_marks_by_hand() -> None:
    marks = [{"a": {"fluency": 5}, "b": {"fluency": 2}}, {"a": {"fluency": 4}, "b": {"fluency": 4}}]
    judgements = [Judgement("ada", Q[0], "a", True, marks[0]), Judgement("ada", Q[1], "tie", True, marks[1])]
    judgements += [Judgement("bob", Q[0], "a", True, {"a": {"fluency": 4}, "b": {"fluency": 1}})]
    judgements += [Judgement("bob", Q[1], "skip", True, None)]
    found = summarize(judgements, 2, Settings("a", "b", ("fluency",), 0)).scales["fluency"]
    assert (found.a.mean, found.b.mean, found.difference.mean) == (4.25, 2.75, 1.5)
    assert found.agreement.shared == 2  # two answers of question 0
    assert "fluency" in summarize(judgements, 2, Settings("a", "b", ("fluency",), 0)).text()


def test_the_export_by_majority_and_by_each() -> None:
    gold = [RatingQuestion("gold", "right", "wrong", gold=True)]
    judgements = [
        *judged("ada", "abab=s"),
        *judged("bob", "aab=xa"),
        *judged("cy", "-bs---"),
        *judged("ada", "a", gold),
    ]
    # Question 0: a a; 1: b a b; 2: a b and a skip; 3: b =; 4: = x; 5: s a.
    each = preference_pairs(judgements, "each")
    assert [(row["chosen"], row["rejected"]) for row in each.rows].count(("a 1", "b 1")) == 1
    assert len(each.rows) == 9
    assert each.left_out == {"tie": 2, "both_bad": 1, "skip": 2, "no_majority": 0, "empty": 0}
    majority = preference_pairs(judgements, "majority")
    assert [(row["prompt"], row["chosen"]) for row in majority.rows] == [
        ("prompt 0", "a 0"),
        ("prompt 1", "b 1"),
        ("prompt 5", "a 5"),
    ]
    assert majority.left_out["no_majority"] == 3
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in majority.rows)
    assert (
        "3 preference pairs; left out: 2 ties, 1 both bad, 2 skipped, 3 questions without a majority."
        in majority.sentence()
    )


def test_conversations_are_exported_as_messages_and_empty_answers_not_at_all() -> None:
    chat = RatingQuestion([{"role": "user", "content": "Hi"}], "yes", "no")
    found = preference_pairs(judged("ada", "bb", [chat, RatingQuestion("p", "", "text")]), "each")
    assert found.rows == (
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "no"}],
            "rejected": [{"role": "assistant", "content": "yes"}],
        },
    )
    assert found.left_out["empty"] == 1
