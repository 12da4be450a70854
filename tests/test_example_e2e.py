"""The E2E NLG example: the checker against sentences judged by hand, the data without overlap, the evaluation."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples.e2e import augment, facts, prepare, pretrain, pretrained, rewards, slot_errors
from examples.e2e.slots import check
from transformers import AutoModelForCausalLM, AutoTokenizer

MEANING = (
    "name[The Eagle], eatType[coffee shop], food[Chinese], priceRange[less than £20], customer rating[low], "
    "area[riverside], familyFriendly[yes], near[Burger King]"
)
TEXT = (
    "The Eagle is a family-friendly coffee shop by the riverside near Burger King. It serves Chinese food at low prices "
    "and has a low customer rating."
)
SHARED = prepare.SHARED


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/e2e")


def test_parse_reads_both_forms_alike() -> None:
    parsed = facts.parse(MEANING)
    assert parsed[0] == ("name", "The Eagle")
    assert parsed[4] == ("customer rating", "low")
    assert len(parsed) == 8
    assert facts.parse(facts.as_prompt(parsed)) == parsed
    assert facts.as_prompt(parsed[:2]) == "name: The Eagle | eatType: coffee shop =>"
    with pytest.raises(ValueError, match="meaning representation"):
        facts.parse("Tell me a story.")


def test_checker_finds_nothing_wrong_in_a_right_sentence() -> None:
    report = check(MEANING, TEXT)
    assert (report.facts, report.missed, report.wrong, report.added, report.hits) == (8, (), (), (), 1.0)


@pytest.mark.parametrize(
    ("old", "new", "slot"),
    [
        ("The Eagle", "The Mill", "name"),
        ("Burger King", "the Ranch", "near"),
        ("coffee shop", "pub", "eatType"),
        ("Chinese", "French", "food"),
        ("low prices", "high prices", "priceRange"),
        ("low prices", "£20-25", "priceRange"),
        ("low customer rating", "customer rating of 5 out of 5", "customer rating"),
        ("low customer rating", "3 out of 5 rating", "customer rating"),
        ("by the riverside", "in the city centre", "area"),
        ("family-friendly", "non family-friendly", "familyFriendly"),
        ("a family-friendly", "an adults only", "familyFriendly"),
    ],
)
def test_checker_catches_a_swapped_value(old: str, new: str, slot: str) -> None:
    assert old in TEXT
    report = check(MEANING, TEXT.replace(old, new))
    assert [name for name, _ in report.wrong] == [slot]
    assert report.missed == report.wrong
    assert not report.added
    assert report.hits == pytest.approx(7 / 8)


@pytest.mark.parametrize(
    ("part", "slot"),
    [
        (" near Burger King", "near"),
        (" by the riverside", "area"),
        ("family-friendly ", "familyFriendly"),
        (" at low prices", "priceRange"),
        (" and has a low customer rating", "customer rating"),
        (" It serves Chinese food at low prices and has", "food"),
    ],
)
def test_checker_catches_a_dropped_part(part: str, slot: str) -> None:
    assert part in TEXT
    report = check(MEANING, TEXT.replace(part, ""))
    assert slot in [name for name, _ in report.missed]
    assert not report.wrong
    assert not report.added


@pytest.mark.parametrize(
    ("slot", "sentence"),
    [
        ("near", "It is near Café Sicilia."),
        ("area", "You find it in the city centre."),
        ("familyFriendly", "Children are not welcome."),
        ("priceRange", "The price range is more than £30."),
        ("customer rating", "Customers rate it 1 out of 5."),
        ("food", "They serve Italian food."),
    ],
)
def test_checker_catches_an_added_fact(slot: str, sentence: str) -> None:
    meaning = "name[Wildwood], eatType[pub]"
    assert check(meaning, "Wildwood is a pub.").added == ()
    report = check(meaning, "Wildwood is a pub. " + sentence)
    assert [name for name, _ in report.added] == [slot]
    assert not report.missed


@pytest.mark.parametrize(
    ("meaning", "text"),
    [
        ("customer rating[1 out of 5]", "It has a 1 out of 5 customer rating."),
        ("customer rating[1 out of 5]", "It is poorly rated."),
        ("customer rating[average], priceRange[high]", "The price range is high and the customer rating is average."),
        ("customer rating[high], priceRange[cheap]", "Low prices, highly rated."),
        ("customer rating[low], priceRange[high]", "A high price range and a low customer rating."),
        ("priceRange[£20-25]", "Meals cost between £20 and £25, £20 - £25 to be exact."),
        ("priceRange[moderate]", "It is reasonably priced."),
        ("familyFriendly[no]", "It isn't kid friendly."),
        ("familyFriendly[no]", "Don't bring the children."),
        ("familyFriendly[yes]", "Not cheap, but kids are welcome."),
        ("near[Café Sicilia]", "It's close to Cafe Sicilia."),  # no coffee shop
        ("near[Raja Indian Cuisine]", "Next to the Raja Indian Cuisine."),  # no Indian food
        ("name[Balosa Gis]", "There is Balosa Gis."),  # a name the checker doesn't know
        ("name[Cocum], near[The Rice Boat]", "Cocum is by the Rice Boat."),  # a restaurant as landmark
        ("eatType[pub], eatType[restaurant]", "A restaurant and pub."),
    ],
)
def test_checker_understands(meaning: str, text: str) -> None:
    report = check(meaning, text)
    assert (report.missed, report.added) == ((), ())


def test_checker_counts_a_contradiction_as_added() -> None:
    report = check("food[Chinese]", "It serves Chinese and French food.")
    assert report.hits == 1.0
    assert report.added == (("food", "French"),)


@needs_data
@pytest.mark.parametrize("name", ["train", "test"])
def test_checker_agrees_with_human_references(name: str) -> None:
    rows = prepare.read_jsonl(SHARED / f"{name}.jsonl")[::5]
    pairs = [(row["prompt"], text) for row in rows for text in row.get("references", [row.get("completion")])]
    reports = [check(meaning, text) for meaning, text in pairs]
    total = sum(report.facts for report in reports)
    assert sum(len(report.missed) for report in reports) / total < 0.01
    # Most of these are really said, and the meaning representation lacks them.
    assert sum(len(report.added) for report in reports) / total < 0.04


@needs_data
def test_checker_is_not_lax_on_human_references() -> None:
    """Give each sentence one other value of one slot: nearly every time it must be found out."""
    rows = prepare.read_jsonl(SHARED / "train.jsonl")[::20]
    inventory = facts.take_inventory(facts.parse(row["prompt"]) for row in rows)
    generator = random.Random(0)
    caught = tried = 0
    for row in rows:
        true = facts.parse(row["prompt"])
        position = generator.randrange(len(true))
        slot, value = true[position]
        other = generator.choice(list(inventory.values[slot]))
        same = {
            frozenset(pair)
            for pair in (
                ("cheap", "less than £20"),
                ("moderate", "£20-25"),
                ("high", "more than £30"),
                ("low", "1 out of 5"),
                ("average", "3 out of 5"),
                ("high", "5 out of 5"),
            )
        }
        if other == value or frozenset((value, other)) in same or check(true, row["completion"]).missed:
            continue
        tried += 1
        report = check((*true[:position], (slot, other), *true[position + 1 :]), row["completion"])
        caught += (slot, other) in report.missed
    assert tried > 100
    assert caught / tried > 0.97


def _pairs() -> list[tuple[facts.Fact, ...]]:
    names, foods, areas = ("Cotto", "Aromi", "The Mill"), ("Chinese", "English"), ("riverside", "city centre")
    return [(("name", n), ("food", f), ("area", a)) for n in names for f in foods for a in areas]


def test_invented_prompts_are_new_and_different() -> None:
    known = _pairs()
    taken = known[:4]
    new = facts.invent(facts.take_inventory(known), 8, taken, seed=1)
    assert {frozenset(one) for one in new} == {frozenset(one) for one in known[4:]}
    assert new == facts.invent(facts.take_inventory(known), 8, taken, seed=1)
    with pytest.raises(ValueError, match="8 of 9"):
        facts.invent(facts.take_inventory(known), 9, taken, seed=1)


def test_varied_copies_say_what_they_are_asked_to_say() -> None:
    inventory = facts.take_inventory(_pairs())
    original = (("name", "Aromi"), ("food", "English"), ("area", "riverside"))
    generator = random.Random(0)
    copies = [
        augment.vary(original, "Aromi is an English place by the river.", inventory, generator) for _ in range(50)
    ]
    varied = [copy for copy in copies if copy is not None]
    assert len(varied) > 20
    for meaning, text in varied:
        assert meaning != original
        assert check(meaning, text).hits == 1.0
        assert "an Chinese" not in text
        assert "a English" not in text
    assert augment.vary(original, "Nothing is said here.", inventory, generator) is None


def _rows(count: int) -> tuple[prepare.Rows, prepare.Rows]:
    """Made-up data in the files' format, for checkouts without ../shared."""

    def meaning(pair: tuple[facts.Fact, ...]) -> str:
        return ", ".join(f"{slot}[{value}]" for slot, value in pair)

    pairs = _pairs()
    train = [
        {"prompt": meaning(pair), "completion": f"{pair[0][1]} has {pair[1][1]} food,  {pair[2][1]}."}
        for pair in (pairs[number] for number in (0, 3, 5, 6, 8, 11))
    ] * count
    test = [{"prompt": meaning(pair), "references": [f"{pair[0][1]}:  {pair[1][1]}."]} for pair in (pairs[1], pairs[4])]
    return train, test


OPTIONS = prepare.Options(unlabelled=2, held_out=2, vocab_size=400, layers=1, hidden_size=32, heads=2)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A prepared work folder with a very small untrained model."""
    data = tmp_path / "data"
    train, test = _rows(3)
    prepare.write_jsonl(data / "train.jsonl", train)
    prepare.write_jsonl(data / "test.jsonl", test)
    prepare.main(replace(OPTIONS, data=data, work=tmp_path / "work"))
    return tmp_path / "work"


def test_prepare_keeps_its_files_apart(work: Path) -> None:
    prompts = {
        name: {frozenset(facts.parse(row["prompt"])) for row in prepare.read_jsonl(work / f"{name}.jsonl")}
        for name in ("sft", "unlabelled", "held_out", "test")
    }
    assert {name: len(some) for name, some in prompts.items() if name != "sft"} == {
        "unlabelled": 2,
        "held_out": 2,
        "test": 2,
    }
    together = [one for some in prompts.values() for one in some]
    assert len(together) == len(set(together))
    row = prepare.read_jsonl(work / "sft.jsonl")[0]
    assert row == {
        "prompt": "name: Cotto | food: Chinese | area: riverside =>",
        "completion": " Cotto has Chinese food, riverside.",
    }


def test_prepare_refuses_data_that_overlap(tmp_path: Path) -> None:
    train, test = _rows(1)
    with pytest.raises(prepare.DataError, match="1 prompts of test are also in train"):
        prepare.prepare_data(replace(OPTIONS, work=tmp_path), train, [*test, {**test[0], "prompt": train[0]["prompt"]}])


def test_read_names_the_malformed_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(prepare.DataError, match=r"bad\.jsonl, line 2: not JSON"):
        prepare.read_jsonl(tmp_path / "bad.jsonl")
    with pytest.raises(prepare.DataError, match=r"absent\.jsonl"):
        prepare.read_jsonl(tmp_path / "absent.jsonl")


def test_tokenizer_loses_nothing_and_stops(work: Path) -> None:
    model, tokenizer = load(work / "init")
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    text = "name: Zizzi => It's  £20-25 , at Café Sicilia!\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # A prompt's tokens begin those of prompt + completion, and a value is the same token in both.
    prompt, completion = "name: Cotto =>", " Cotto has food"
    joined = tokenizer(prompt + completion).input_ids
    assert joined == tokenizer(prompt).input_ids + tokenizer(completion, add_special_tokens=False).input_ids
    cotto = tokenizer(" Cotto", add_special_tokens=False).input_ids
    assert joined[len(tokenizer("name:").input_ids) :][: len(cotto)] == cotto


def test_pretraining_trains_on_the_completion_only_and_learns(work: Path) -> None:
    model, tokenizer = load(work / "init")
    rows = pretrain.encode(prepare.read_jsonl(work / "sft.jsonl"), tokenizer)
    ids, mask, labels = pretrain.collate(rows[:2], tokenizer.pad_token_id)
    assert mask.sum() == sum(len(tokens) for tokens, _ in rows[:2])
    assert (labels != pretrain.IGNORED).sum() == sum(len(tokens) - prompt for tokens, prompt in rows[:2])
    assert ids[0, len(rows[0][0]) - 1] == labels[0, len(rows[0][0]) - 1] == tokenizer.eos_token_id
    options = pretrain.Options(epochs=8, batch_size=4, learning_rate=5e-3)
    assert pretrain.train(model, rows, tokenizer.pad_token_id, options) < 1.5  # log(vocabulary) is about 6


def test_rewards_by_hand() -> None:
    prompt = "name: Wildwood | eatType: pub =>"
    texts = ["Wildwood is a pub.", "Wildwood.", "Wildwood is a pub by the river."]
    ids = [[1]] * 3
    assert rewards.slot_hits([prompt] * 3, texts, ids) == pytest.approx([1.0, 0.5, 0.5])
    assert rewards.hits([prompt] * 3, texts, references=None) == pytest.approx([1.0, 0.5, 1.0])


def test_slot_error_rate_is_that_of_the_set() -> None:
    # 2 slots, one missed, and one said besides; 3 slots, one of them wrong: 3 errors in 5 slots, not the mean of 1 and 1/3.
    prompts = ["name: Cotto | eatType: pub =>", "name: Cotto | area: riverside | food: Chinese =>"]
    found = slot_errors.report(prompts, ["Cotto by the river.", "Cotto: Italian food by the river."])
    assert np.mean([one["slot_error_rate"] for one in found]) == pytest.approx(60.0)
    assert [one["missed"] for one in found] == pytest.approx([1 / 2, 1 / 3])
    assert [one["wrong"] for one in found] == pytest.approx([0, 1 / 3])
    assert [one["added"] for one in found] == pytest.approx([1 / 2, 0])


def test_random_reward_is_uniform_and_repeats_itself() -> None:
    texts = [f"answer {number}" for number in range(2000)]
    values = rewards.random_reward(["p"] * 2000, texts, [[1]] * 2000)
    assert values == rewards.random_reward(["p"] * 2000, texts, [[2]] * 2000)
    assert rewards.random_reward(["q"], ["answer 0"], [[1]])[0] != values[0]
    assert min(values) >= 0.0
    assert max(values) < 1.0
    assert np.mean(values) == pytest.approx(0.5, abs=0.03)
    assert np.std(values) == pytest.approx(12**-0.5, abs=0.02)


@needs_data
def test_prepare_on_a_slice_of_the_real_data(tmp_path: Path) -> None:
    prepare.main(replace(OPTIONS, data=SHARED, work=tmp_path, rows=50, unlabelled=3))
    assert [
        len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("unlabelled", "held_out", "test")
    ] == [3, 2, 50]
    sft = prepare.read_jsonl(tmp_path / "sft.jsonl")
    assert len(sft) >= 50
    assert json.loads((tmp_path / "init" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "init" / "model.safetensors").is_file()


def test_a_pretrained_model_s_files_share_no_meaning(tmp_path: Path) -> None:
    rows, test = ([{"prompt": f"name[The {n}], area[riverside]"} for n in letters] for letters in ("ABCDEFG", "HI"))
    train = [{**row, "completion": f"{row['prompt'][5:10]}  is by the river, in a nice pub."} for row in rows]
    train += [{**rows[0], "completion": "By the river: The A."}]
    prepare.write_jsonl(tmp_path / "train.jsonl", train)
    prepare.write_jsonl(tmp_path / "test.jsonl", [{**row, "references": ["By  the river."]} for row in test])
    work = tmp_path / "work"
    options = pretrained.Options(work, data=tmp_path, pairs=4, held_out=1, noise=0.5)
    pretrained.main(options)
    files = {
        name: prepare.read_jsonl(work / f"{name}.jsonl") for name in ("sft", "noisy", "held_out", "prompts", "test")
    }
    assert {name: len(some) for name, some in files.items()} == {
        "sft": 4,
        "noisy": 4,
        "held_out": 1,
        "prompts": 2,
        "test": 2,
    }
    prompts = [row["prompt"] for name, some in files.items() if name != "noisy" for row in some]
    assert len(set(prompts)) == len(prompts)
    for row in files["sft"]:
        assert row["prompt"].endswith("]\nDescription:")
        assert row["completion"].startswith(" ")
        assert "  " not in row["completion"]
        assert check(row["prompt"], row["completion"]).facts == 2
    assert files["test"][0]["references"] == ["By the river."]
    assert not any("completion" in row for name in ("held_out", "prompts", "test") for row in files[name])
    # Half of the noisy sentences are others, in their places, and still begin with a space.
    changed = [a != b for a, b in zip(files["sft"], files["noisy"], strict=True)]
    assert sum(changed) == 2
    assert [row["prompt"] for row in files["sft"]] == [row["prompt"] for row in files["noisy"]]
    assert all(row["completion"].startswith(" ") for row in files["noisy"])
    prepare.write_jsonl(tmp_path / "test.jsonl", [{**rows[0], "references": ["The A."]}])
    with pytest.raises(prepare.DataError, match="1 prompts of train are also in test"):
        pretrained.main(options)
