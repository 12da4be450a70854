"""The quickstart's task: disjoint sets, an honest checker, and text the tokenizer gives back unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagsr.quickstart.task import (
    DROP,
    SUBJECTS,
    facts_covered,
    facts_metric,
    make_pairs,
    make_prompts,
    read_prompt,
    stated_facts,
    wrong_facts,
)

MARA = "Introduce this person. name: Mara; job: baker; city: Lisbon; hobby: chess; pet: parrot."


def test_everything_follows_from_the_seed() -> None:
    assert make_pairs(20, 1) == make_pairs(20, 1) != make_pairs(20, 2)
    assert make_prompts(20, 1) == make_prompts(20, 1) != make_prompts(20, 2)
    assert make_pairs(10, 1) == make_pairs(20, 1)[:10]


def test_the_three_sets_share_no_combination_of_facts() -> None:
    sets = [
        {tuple(sorted(read_prompt(row["prompt"]).items())) for row in rows}
        for rows in (make_pairs(3000, 0), make_prompts(3000, 0), make_prompts(3000, 0, "held_out"))
    ]
    assert all(len(one) > 2900 for one in sets)
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_unlabelled_prompts_carry_no_answer_and_held_out_ones_a_complete_one() -> None:
    assert all(set(row) == {"prompt"} for row in make_prompts(50, 3))
    for row in make_prompts(200, 3, "held_out"):
        assert facts_covered(row["prompt"], row["reference"]) == 1.0
        assert wrong_facts(row["prompt"], row["reference"]) == 0


def test_the_annotator_is_hasty_but_never_wrong() -> None:
    pairs = make_pairs(2000, 0)
    # The name is always said; of 4 to 6 other facts a quarter is left out: 1 - 0.25 * 5 / 6 on average.
    covered = sum(facts_metric([row["prompt"] for row in pairs], [row["completion"] for row in pairs])) / len(pairs)
    assert covered == pytest.approx(1 - DROP * 5 / 6, abs=0.015)
    assert sum(wrong_facts(row["prompt"], row["completion"]) for row in pairs) == 0
    stated = [stated_facts(row["prompt"], row["completion"]) for row in pairs]
    repeats = sum(len([f for f in one if f[0] != "name"]) > len({f for f in one if f[0] != "name"}) for one in stated)
    assert 0.1 < repeats / len(pairs) < 0.2


@pytest.mark.parametrize(
    ("answer", "covered", "wrong"),
    [
        ("Mara is a baker and lives in Lisbon. She enjoys chess and keeps a parrot.", 1.0, 0),
        (" Mara works as a baker.", 0.4, 0),
        ("Mara works as a teacher.", 0.2, 1),  # a wrong value
        ("Mara is a baker. Mara is a baker.", 0.4, 0),  # twice is not more
        ("Mara speaks Greek.", 0.2, 1),  # an invention
        ("Jonas is a baker.", 0.2, 1),  # another name
        ("Mara is a baker in Lisbon with chess and parrot.", 0.4, 0),  # words without their phrase state nothing
        ("baker Lisbon chess parrot Mara", 0.0, 0),
        ("Mara lives in baker.", 0.2, 0),
        ("Mara is a bakery.", 0.2, 0),
        ("", 0.0, 0),
    ],
)
def test_the_checker_by_hand(answer: str, covered: float, wrong: int) -> None:
    assert facts_covered(MARA, answer) == pytest.approx(covered)
    assert wrong_facts(MARA, answer) == wrong


def test_a_chef_is_no_second_name() -> None:
    prompt = "Describe this restaurant. name: Willow; chef: Clara; mood: cosy; town: York; view: park."
    assert stated_facts(prompt, "Willow is run by Clara. It feels cosy.") == [
        ("name", "Willow"),
        ("chef", "Clara"),
        ("mood", "cosy"),
    ]


def test_a_text_that_is_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt of the quickstart task"):
        facts_covered("Hello there.", "Mara is a baker.")


def test_phrases_of_one_subject_never_state_two_facts_at_once() -> None:
    for name, subject in SUBJECTS.items():
        prompt = f"Write about this {name}. name: {next(iter(subject.names))}; x: y."
        for kind, fact in subject.facts.items():
            for phrase in fact.phrases:
                for value in fact.values:
                    assert stated_facts(prompt, f"It {phrase.format(value)}.") == [(kind, value)]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_tokenizer_has_every_word_and_gives_the_text_back(seed: int) -> None:
    from cagsr.quickstart.start_model import build_tokenizer

    tokenizer = build_tokenizer()
    for row in make_pairs(5, seed):
        ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert tokenizer.unk_token_id not in ids
        # Apart or together, the same tokens: what training saw is what a rollout continues.
        assert ids == tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer(row["completion"])["input_ids"]) == row["completion"].strip()
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_the_start_is_made_by_sft_and_loads_as_any_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cagsr.quickstart.start_model import Recipe

    start = Recipe(tmp_path, "start", data_seed=0, seed=0, pairs=64, steps=3).make()
    assert start == tmp_path / "start"
    assert len([json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]) == 64
    model = AutoModelForCausalLM.from_pretrained(start)
    tokenizer = AutoTokenizer.from_pretrained(start)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert model.num_parameters() < 1_000_000
