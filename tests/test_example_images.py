"""The generated world of pictures: captions are what the annotator's slips make of the facts, and the checker is right by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from examples.images import facts, fields, seen, start, write
from examples.images.empty import EmptyCoverage, empty_coverage
from examples.images.model import reader
from examples.images.world import COLOURS, FIELD, HABIT, PLACES, STOCK, Thing, caption, picture, rows

from cagsr.commands.main import main
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import read_plan
from cagsr.config import validate

ROOT = Path(__file__).parents[1]
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
    assert whole == {"said": 1.0, "things": 1.0, "right": 1.0, "wrong": 0.0, "invented": 0.0, "again": 0.0}
    # Red and circles are right; three and rings are wrong; three properties of a field that holds nothing; one field again.
    assert part == {
        "said": pytest.approx(2 / 6),
        "things": 0.5,
        "right": 2 / 7,
        "wrong": 2.0,
        "invented": 3.0,
        "again": 1.0,
    }
    assert none == {"said": 0.0, "things": 0.0, "right": None, "wrong": 0.0, "invented": 0.0, "again": 0.0}
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert facts.told([], messages, [TRUTH] * 3) == [1.0, pytest.approx((2 - 5) / 6 - 0.1), 0.0]
    assert facts.said([], texts, [TRUTH] * 3) == [1.0, pytest.approx(2 / 6), 0.0]
    # A number that is the picture's and the description's own.
    ones = facts.random_reward([], [messages[0], messages[0], messages[1]], [TRUTH, TRUTH[:1], TRUTH])
    assert len(set(ones)) == 3
    assert ones[0] == facts.random_reward([], messages[:1], [TRUTH])[0]


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


def test_fields_spoken_of_are_counted_by_hand():
    empty = "Centre: one red circle. Southeast: one cross."  # the stock phrase, of a picture whose centre shows nothing
    own = [TRUTH, TRUTH, ["centre: one red circle"]]
    seeds = [[empty, "Northwest: rings.", empty], ["", "", ""]]
    spoken = fields.spoken_of(seeds, own)
    assert {place: share for place, share in spoken.items() if share} == {
        "northwest": 1 / 4,
        "southeast": 1 / 4,
        "centre": 1 / 2,
    }
    assert fields.habit(seeds, own).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_looking_at_what_shows_nothing_by_hand():
    # Two tokens and a padded one look at three regions, of which the last two show nothing.
    looked = torch.tensor([[[0.9, 0.03, 0.15], [0.1, 0.15, 0.0], [0.0, 0.9, 0.9]]])
    images = (SimpleNamespace(weights=torch.tensor([0.7, 0.0, 0.0])),)
    episodes = SimpleNamespace(sampled=torch.tensor([[True, True, False]]), prompts=SimpleNamespace(images=images))
    batch: Any = SimpleNamespace(attention=SimpleNamespace(regions=looked), episodes=episodes)
    assert EmptyCoverage()(batch).tolist() == pytest.approx([0.5])  # 0.15 of 0.3, in either
    assert empty_coverage(batch, 0.15).tolist() == pytest.approx([1.0])


def test_a_caption_is_read_as_tokens_and_learned_alone(tmp_path: Path):
    (things, row), *_ = rows("pairs", 1, 0)
    (tmp_path / "pictures").mkdir()
    picture(things, random.Random(0)).save(tmp_path / "pictures" / "one.png")
    processor = reader()
    read = start.encoded(processor, {**row, "images": ["pictures/one.png"]}, tmp_path)
    caption, learned = row["completion"][0]["content"], read["labels"] != start.IGNORED
    assert processor.tokenizer.decode(read["labels"][learned]) == f"{caption}<eos>"
    asked = row["prompt"][0]["content"]
    assert (
        processor.tokenizer.decode(read["input_ids"][~learned]) == f"<|user|>{'<image>' * 9}{asked}<|end|><|assistant|>"
    )
    # What each field is and shows, 0 for nothing.
    shown = start.fields(TRUTH)
    assert shown[PLACES.index("northwest")].tolist() == [0, 2, 1, 1]
    assert shown[PLACES.index("southeast")].tolist() == [8, 1, 6, 4]
    assert shown[PLACES.index("centre")].tolist() == [4, 0, 0, 0]


def test_a_model_learns_captions_and_is_trained_on_pictures_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write.main(write.Options(tmp_path, pairs=16, prompts=6, held_out=4, test=30))
    read = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    shown = {row["images"][0]: facts.truth(row["facts"]) for row in read}
    for row in read:
        assert (tmp_path / row["images"][0]).is_file()
        assert not facts.truth(row["facts"]) & shown[row["swapped"]]
    start.main(start.Options(tmp_path, tmp_path / "start", sight=2, epochs=1, batch_size=8))
    how = {
        "config": ROOT / "examples/images/settings.yaml", "model.path": tmp_path / "start", "model.device": "cpu",
        "data.path": tmp_path / "prompts.jsonl", "evaluation.path": tmp_path / "held_out.jsonl",
        "output_dir": tmp_path / "run", "reward.image_coverage.weight": 1, "run.steps": 1, "run.batch_size": 2,
        "sampling.num_generations": 2, "sampling.max_new_tokens": 6, "evaluation.held_out": 2, "evaluation.every": 1,
    }  # fmt: skip
    assert main(["train", *(str(part) for name, value in how.items() for part in (f"--{name}", value))]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < metrics["rewards/image_coverage/mean"] <= 1
    assert 0 <= metrics["eval/metric"] <= 1
    seen.main(seen.Options(tmp_path, tmp_path / "run" / "final", tmp_path / "seen.json", prompts=2))
    found = json.loads((tmp_path / "seen.json").read_text())
    assert 0 < found["things, layers all, 0.3"]["mean"] <= 1
    assert found["length"]["said|"] == 0.0


@pytest.mark.parametrize("fast", [False, True])
def test_the_plan_can_be_read(fast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(ROOT / "examples" / "images" / "images.yaml", fast=fast)
    for method in plan.methods:
        validate(reward_settings(plan, method, 0))
