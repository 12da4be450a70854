"""Associations against numbers worked out by hand, and what a reward may rely on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from cagsr.commands.main import main
from cagsr.config import AssociationsConfig, ModelConfig, SalienceConfig, SamplingConfig
from cagsr.errors import ConfigError, DataError
from cagsr.models.load import load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.reward.association import Associations, learn_associations
from cagsr.reward.learn_associations import associations_of, read_associations

# 8 prompts: "yes" in 4, "no" in 4; "kids" is said in 3 of the 4 with yes and in 1 of the 4 with no; "fine" is always said;
# each prompt has a name that occurs once, said in 4 of 8 answers.
PROMPTS = [
    (f"name {name} family {family}", ()) for name, family in zip("abcdefgh", ["yes"] * 4 + ["no"] * 4, strict=True)
]
ANSWERS = ["a fine kids", "b fine kids", "fine kids", "fine", "e fine", "f fine", "fine", "fine kids"]
PHI = (8 * 3 - 4 * 4) / math.sqrt(4 * 4 * 4 * 4)  # (N n_wv - n_w n_v) / sqrt(...) = 8 / 16


@pytest.fixture
def learned() -> Associations:
    return learn_associations(PROMPTS, ANSWERS, min_count=3, floor=0.2)


def test_phi_by_hand(learned: Associations):
    assert pytest.approx(0.5) == PHI
    assert learned.strongest("yes") == [("kids", pytest.approx(0.5))]
    assert learned.strongest("family yes") == [("kids", pytest.approx(0.5))]
    # "no" goes against "kids" (phi -0.5), "family" is in every prompt, "fine" in every answer: none of them has a phi
    assert learned.strongest("no") == []
    assert "family" not in learned.prompt_index
    assert "fine" not in learned.answer_index
    # names occur once: said literally in 4 of 8 answers
    assert learned.rare == pytest.approx(math.sqrt(0.5))
    assert learned.answers == 8


def test_coverage_by_hand(learned: Associations):
    rare = math.sqrt(0.5)
    possible = 2 * 0.5 + rare  # "yes" and "family yes", and the name
    assert learned.coverage("name z family yes", "z is good for kids") == pytest.approx(1.0)
    assert learned.coverage("name z family yes", "Z") == pytest.approx(rare / possible)
    assert learned.coverage("name z family yes", "for KIDS") == pytest.approx(1.0 / possible)
    assert learned.coverage("name z family yes", "") == 0.0
    # nothing is asked for that was ever told apart, but for the name
    assert learned.coverage("name z family no", "kids") == 0.0
    assert learned.coverage("name z family no", "z") == pytest.approx(1.0)
    # the template is no part of the prompt
    assert learned.coverage("yes name z", "kids", ((0, 4),)) == 0.0


def test_unsupported_by_hand(learned: Associations):
    assert learned.unsupported("name z family no", "z is good for kids") == pytest.approx(1.0)
    assert learned.unsupported("name z family yes", "z is good for kids and kids and kids") == 0.0
    # "kids" goes with "yes" and "family yes" alike: either of them supports it
    assert learned.unsupported("yes", "kids") == 0.0
    # what the prompt says literally is supported whatever else it goes with
    assert learned.unsupported("kids no", "kids") == 0.0
    assert learned.unsupported("name z family no", "") == 0.0
    assert learned.unsupported("name z family no", "nothing known here") == 0.0


def test_partial_support_weighs_by_strength():
    # "x" is said with "one" (phi 1) and "y" with "two" in part; prompt "two" supports "y" fully and "x" not at all
    prompts = [(f"one {name}", ()) for name in "abcde"] + [(f"two {name}", ()) for name in "fghij"]
    answers = ["x"] * 5 + ["y"] * 4 + ["z"]
    found = learn_associations(prompts, answers, min_count=2)
    y = (10 * 4 - 5 * 4) / math.sqrt(5 * 5 * 4 * 6)
    assert dict(found.strongest("two")) == {"y": pytest.approx(y)}
    assert found.unsupported("two", "x y") == pytest.approx(1.0 / (1.0 + y))


def test_too_few_together_is_chance():
    # seen together twice only: phi would be 0.79
    prompts = [(f"rareword thing u{n}", ()) for n in range(3)] + [(f"thing v{n}", ()) for n in range(30)]
    answers = ["odd", "odd", "plain"] + ["plain"] * 30
    assert (
        learn_associations(prompts, answers, min_count=2).strongest("rareword") != []
    )  # min(3, 2) together are enough
    assert learn_associations(prompts, answers, min_count=3).prompt_index.keys() == {"rareword", "rareword thing"}
    assert learn_associations(prompts, answers, min_count=3).strongest("rareword") == []


def test_a_prompt_that_is_answered_often_is_one_prompt():
    # 20 prompts, ten answers each: a name is no frequent word for having been answered ten times
    prompts = [(f"name n{n} family {'yes' if n % 2 else 'no'}", ()) for n in range(20) for _ in range(10)]
    answers = [
        f"n{n} {'kids' if n % 2 else 'fine'}{' invented' if n == 0 and i < 6 else ''}"
        for n in range(20)
        for i in range(10)
    ]
    found = learn_associations(prompts, answers)
    assert found.prompt_index.keys() == {"yes", "no", "family yes", "family no"}
    assert found.rare == pytest.approx(1.0)  # names are always said
    assert found.strongest("yes")[0] == ("kids", pytest.approx(1.0))
    # said to one prompt alone, in most of its answers: that makes nothing of it that the prompt supports
    assert "invented" not in dict(found.strongest("n0"))
    assert found.coverage("name n0 family no", "invented fine") < found.coverage("name n0 family no", "n0 fine")


def test_nothing_to_learn_from_is_no_error():
    found = learn_associations([], [])
    assert (found.coverage("a b", "a"), found.unsupported("a b", "c")) == (0.0, 0.0)
    found = learn_associations([("same words", ())] * 6, ["same"] * 6)
    assert found.coverage("same words", "same") == 0.0
    assert found.unsupported("other", "same") == 0.0


def test_bad_arguments():
    with pytest.raises(ValueError, match="1 prompts, 0 answers"):
        learn_associations([("a", ())], [])
    with pytest.raises(ValueError, match="floor"):
        learn_associations([], [], floor=0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_values_are_shares_and_survive_json(seed: int):
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(6)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(40)]
    answers = [" ".join(draw.choices(words, k=draw.randint(0, 5))) for _ in range(40)]
    found = learn_associations([(text, ()) for text in texts], answers, min_count=2, floor=0.05)
    again = Associations.from_json(json.loads(json.dumps(found.to_json())))
    for text, answer in zip(texts, reversed(answers), strict=True):
        coverage, unsupported = found.coverage(text, answer), found.unsupported(text, answer)
        assert -1e-9 <= coverage <= 1 + 1e-9
        assert -1e-9 <= unsupported <= 1 + 1e-9
        assert again.coverage(text, answer) == pytest.approx(coverage, abs=1e-4)
        assert again.unsupported(text, answer) == pytest.approx(unsupported, abs=1e-4)
        # picking from the sparse matrix, as for large vocabularies, gives the same
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cagsr.reward.association.DENSE_UP_TO", 0)
            large = Associations.from_json(found.to_json())
            assert large.coverage(text, answer) == pytest.approx(coverage, abs=1e-4)
            assert large.unsupported(text, answer) == pytest.approx(unsupported, abs=1e-4)
        # saying more never covers less, and the order of words in an answer means nothing
        assert found.coverage(text, f"{answer} w1") >= coverage - 1e-12
        assert found.coverage(text, " ".join(reversed(answer.split()))) == coverage


@pytest.mark.parametrize("content", ["not json", "[]", '{"format": "other"}', '{"answers": 3}'])
def test_a_file_that_is_something_else(tmp_path: Path, content: str):
    file = tmp_path / "associations.json"
    file.write_text(content)
    with pytest.raises(DataError, match=str(file)):
        read_associations(file)
    with pytest.raises(DataError, match="missing"):
        read_associations(tmp_path / "missing.json")


def test_learned_from_a_model_repeatably_and_without_touching_the_generators(tmp_path: Path):
    import torch

    loaded = load_model(ModelConfig(path=str(tiny.save_model(tmp_path / "m")), device="cpu"), for_training=False)
    texts = [
        f"tell me about the {colour} {animal}"
        for colour in ("red", "blue", "green", "big", "small")
        for animal in ("cat", "dog", "bird", "house", "tree")
    ]
    prompts = encode_texts(texts, loaded.tokenizer, SalienceConfig(), 40)
    sampling, config = SamplingConfig(max_new_tokens=6), AssociationsConfig(answers=60, min_count=2, floor=0.01)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = associations_of(loaded, prompts, sampling, config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = associations_of(loaded, prompts, sampling, config, seed=1)
    assert first.to_json() == again.to_json()
    assert first.answers == 75  # 25 prompts: 3 answers each are the first multiple of 25 that reaches 60
    with pytest.raises(ConfigError, match="20 prompts or more, and there are 5"):
        associations_of(loaded, prompts[:5], sampling, config, seed=1)


def test_commands_use_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = tiny.save_model(tmp_path / "start")
    rows = [
        {"prompt": f"tell me about the {colour} {animal}", "completion": f"the {colour} {animal}"}
        for colour in ("red", "blue", "green", "big", "small")
        for animal in ("cat", "dog", "bird", "house", "tree")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = ["--reward.associated_coverage.weight", "1", "--reward.unsupported.weight", "-0.5"]
    few = ["--reward.associations.answers", "60", "--reward.associations.min_count", "2", "--max_new_tokens", "5"]
    train = ["train", "--model", str(start), "--data", str(data), "--output_dir", str(tmp_path / "run"), *weights, *few]
    train += [
        "--steps",
        "2",
        "--run.batch_size",
        "3",
        "--num_generations",
        "2",
        "--evaluation.held_out",
        "2",
        "--run.save_every",
        "1",
    ]
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "Associations from 69 of the model's own answers" in said  # 23 prompts are left to train on
    file = tmp_path / "run" / "associations.json"
    before = file.read_bytes()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/associated_coverage/mean", "rewards/unsupported/mean"} <= metrics[1].keys()
    # a resumed run reads them again: they are of the starting model
    assert main([*train, "--steps", "3", "--resume"]) == 0
    assert f"Associations from {file}" in capsys.readouterr().out
    assert file.read_bytes() == before

    scored = tmp_path / "scores.jsonl"
    score = ["score", "--model", str(start), "--data", str(data), "--output", str(scored), *weights]
    assert main(score) == 2
    assert "--reward.associations.path RUN/associations.json" in capsys.readouterr().err
    assert main([*score, "--reward.associations.path", str(file)]) == 0
    learned = read_associations(file)
    for row, line in zip(rows, scored.read_text().splitlines(), strict=True):
        terms = json.loads(line)["terms"]
        assert terms["associated_coverage"] == pytest.approx(
            learned.coverage(row["prompt"], row["completion"]), abs=1e-6
        )
        assert terms["unsupported"] == pytest.approx(learned.unsupported(row["prompt"], row["completion"]), abs=1e-6)

    ranked = tmp_path / "ranked.jsonl"
    assert main(["rank", "--model", str(start), "--data", str(data), "--output", str(ranked), *weights, *few]) == 0
    assert len(ranked.read_text().splitlines()) == 25
    capsys.readouterr()
    assert main(["rank", "--model", str(start), "--prompt", "tell me about the cat", *weights, *few]) == 2
    assert "20 prompts or more" in capsys.readouterr().err

    found = tmp_path / "diagnosis.json"
    assert (
        main(
            ["diagnose", "--model", str(start), "--data", str(data), "--num_prompts", "4", "--output", str(found), *few]
        )
        == 0
    )
    names = [signal["name"] for signal in json.loads(found.read_text())["signals"]]
    assert {"associated_coverage", "unsupported", "associated_coverage - unsupported"} <= set(names)
