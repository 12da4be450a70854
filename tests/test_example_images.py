"""The generated world of pictures: captions are what the annotator's slips make of the facts, and the checker is right by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from examples.images import facts
from examples.images.world import COLOURS, FIELD, HABIT, PLACES, STOCK, Thing, caption, picture, rows

TWO_RED = Thing("northwest", "two", "red", "circle")
CROSS = Thing("southeast", "one", "black", "cross")
TRUTH = [TWO_RED.said(), CROSS.said()]


def test_sets_never_meet():
    sets = {part: {things for things, _ in rows(part, 60, 0)} for part in ("pairs", "prompts", "test")}
    assert [len(own) for own in sets.values()] == [60, 60, 60]
    assert not sets["pairs"] & sets["prompts"] | sets["prompts"] & sets["test"] | sets["pairs"] & sets["test"]
    assert rows("test", 3, 1) == rows("test", 3, 1) != rows("test", 3, 2)


def test_the_annotator_leaves_out_more_often_than_not_and_seldom_errs():
    made = rows("pairs", 800, 0)
    texts = [row["completion"][0]["content"] for _, row in made]
    found = facts.checked([], texts, [[thing.said() for thing in things] for things, _ in made])
    mean = {name: float(np.mean([one[name] or 0.0 for one in found])) for name in found[0]}
    # He says 2.2 things of 4.5 on the average, without a tenth of their properties; the stock phrase, in three captions of ten, is
    # of an empty field every second time.
    assert 0.4 < mean["said"] < 0.5
    assert 0.45 < mean["things"] < 0.58
    assert np.mean([one["said"] == 1.0 for one in found]) < 0.1
    assert 0.3 < mean["wrong"] < 0.7
    assert 0.3 < mean["invented"] < 0.6
    assert np.mean([STOCK.said().capitalize() in text for text in texts]) == pytest.approx(HABIT, abs=0.05)


def test_facts_are_written_and_read_by_hand():
    assert TRUTH == ["northwest: two red circles", "southeast: one black cross"]
    assert TWO_RED.said(number=False) == "northwest: red circles"
    assert facts.stated("Northwest: red circles.") == {("northwest", "colour", "red"), ("northwest", "shape", "circle")}
    assert facts.stated("Northwest: two circle. Nothing: red crosses. west red") == {
        ("northwest", "number", "two"),
        ("northwest", "shape", "circle"),
    }
    assert facts.truth(TRUTH) == {
        *(("northwest", kind, value) for kind, value in (("number", "two"), ("colour", "red"), ("shape", "circle"))),
        *(("southeast", kind, value) for kind, value in (("number", "one"), ("colour", "black"), ("shape", "cross"))),
    }


def test_descriptions_are_judged_by_hand():
    texts = [
        "Northwest: two red circles. Southeast: one black cross.",
        "Northwest: three red circles. Northeast: one blue square. Northwest: red rings.",
        "",
    ]
    whole, part, none = facts.checked([], texts, [TRUTH] * 3)
    assert whole == {"said": 1.0, "things": 1.0, "wrong": 0.0, "invented": 0.0, "again": 0.0}
    # Red and circles are right; three and rings are wrong; three properties of a field that holds nothing; one field again.
    assert part == {"said": pytest.approx(2 / 6), "things": 0.5, "wrong": 2.0, "invented": 3.0, "again": 1.0}
    assert none == {"said": 0.0, "things": 0.0, "wrong": 0.0, "invented": 0.0, "again": 0.0}
    assert facts.told([], texts, [TRUTH] * 3) == [1.0, pytest.approx((2 - 5) / 6 - 0.1), 0.0]
    assert facts.said([], texts, [TRUTH] * 3) == [1.0, pytest.approx(2 / 6), 0.0]
    # A number that is the picture's and the description's own.
    ones = facts.random_reward([], [texts[0], texts[0], texts[1]], [TRUTH, TRUTH[:1], TRUTH])
    assert len(set(ones)) == 3
    assert ones[0] == facts.random_reward([], texts[:1], [TRUTH])[0]


def test_what_stays_when_the_picture_is_another_is_said_without_looking():
    texts = [
        "Northwest: two red circles. Southeast: two crosses.",
        "Northwest: two blue rings. Southeast: one cross.",
        "",
    ]
    own = [TRUTH, ["northwest: one green square"], ["north: one red ring"]]
    more = {"images": [["a.png"], ["b.png"], ["c.png"]], "swapped": ["b.png", "c.png", "lost.png"]}
    first, second, third = facts.checked([], texts, own, **more)
    # Shown b, it says of a's six facts "two" in the northwest, "one" and "cross" in the southeast; of the five things said of a,
    # "two" in the northwest and "cross" stay.
    assert (first["without_looking"], first["kept"]) == (pytest.approx(3 / 6), pytest.approx(2 / 5))
    assert (second["without_looking"], second["kept"]) == (0.0, 0.0)
    assert "kept" not in third
    # Of nothing said, nothing can stay.
    assert (
        facts.checked([], ["", texts[0]], own[:2], images=[["a.png"], ["b.png"]], swapped=["b.png", "a.png"])[0]["kept"]
        is None
    )


def test_pictures_are_swapped_for_one_that_shares_no_fact():
    other = [Thing("northwest", "one", "blue", "ring").said()]
    same = [Thing("northwest", "two", "blue", "square").said()]
    far = [Thing("west", "one", "blue", "ring").said()]
    assert facts.swaps([TRUTH, same, other, far]) == [2, 3, 3, 0]
    with pytest.raises(ValueError, match="picture 0 shares a fact"):
        facts.swaps([TRUTH, same])


def test_a_picture_shows_its_things_where_they_are():
    pixels = np.asarray(picture((TWO_RED, CROSS), random.Random(0)), dtype=int)
    field = {place: pixels[n // 3 * FIELD :, n % 3 * FIELD :][:FIELD, :FIELD] for n, place in enumerate(PLACES)}
    assert {place for place, part in field.items() if part.std() > 5} == {"northwest", "southeast"}
    # The middles of the two circles, and the ground between them.
    assert all(abs(field["northwest"][10, x] - COLOURS["red"]).max() <= 13 for x in (5, 15))
    assert field["northwest"][1, 1].min() > 220
    assert abs(field["southeast"][10, 10] - COLOURS["black"]).max() <= 13


def test_captions_are_of_what_is_there():
    draw = random.Random(3)
    for text in (caption((TWO_RED, CROSS), draw) for _ in range(50)):
        assert facts.mentions(text)
        assert text == "".join(f" {part.capitalize()}." for part in text.lower()[1:-1].split(". "))
