"""Weights from judgements: fits by hand, and the command as a user runs it; pairs on which terms disagree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import tiny
from cagsr.commands.main import main
from cagsr.config import TrainConfig
from cagsr.errors import DataError
from cagsr.parse import parse_command
from cagsr.preferences.calibrate import agreement, as_strong_as, calibrated, cross_fitted, fit_weights
from cagsr.rating.disagreement import differences, disagreement, questions_by_disagreement, term_scales


def judged(weights: list[float], pairs: int, seed: int = 0) -> np.ndarray:
    """Differences of pairs whose better answer a person with these weights chose (Bradley and Terry's model)."""
    draw = np.random.default_rng(seed)
    moves = draw.normal(size=(pairs, len(weights)))
    wins = draw.random(pairs) < 1 / (1 + np.exp(-moves @ np.array(weights)))
    return np.where(wins[:, None], moves, -moves)


def test_many_judgements_are_believed_and_few_are_not():
    truth, prior = np.array([1.0, -0.5, 0.0]), np.array([1.0, 0.5, 0.0])
    assert fit_weights(judged([1.0, -0.5, 0.0], 20_000), prior, 1.0) == pytest.approx(truth, abs=0.06)
    held = fit_weights(judged([1.0, -0.5, 0.0], 10), prior, 1e6)
    assert held / held[0] == pytest.approx(prior, abs=1e-3)  # its direction; how sure people are is fitted
    # One pair, one term: w = sigmoid(-w) / shrinkage where nothing is known before.
    (alone,) = fit_weights(np.array([[1.0]]), np.array([0.0]), 0.5)
    assert alone == pytest.approx(2 / (1 + np.exp(alone)), abs=1e-4)
    # People who mean the opposite turn no weight round by a multiple below zero.
    assert fit_weights(judged([-1.0], 200), np.array([1.0]), 1e6) == pytest.approx([0.0], abs=1e-2)


def test_new_terms_need_a_reason():
    found = calibrated(judged([1.0, 0.03, 0.5], 3000), np.array([1.0, 0.0, 0.0]), 30.0)
    assert found[1] == 0.0
    assert found[2] > 0.3
    # One that the reward has stays, however small it comes out.
    assert calibrated(judged([1.0, 0.03], 3000), np.array([1.0, 0.3]), 1.0)[1] != 0.0


def test_no_pair_is_judged_by_weights_that_saw_its_prompt():
    noise = np.random.default_rng(0).normal(
        size=(60, 40)
    )  # more terms than they can tell apart: they could be learned by heart
    prompts = [str(number // 2) for number in range(60)]
    assert agreement(noise @ fit_weights(noise, np.zeros(40), 0.01)).mean() == 1.0
    assert agreement(cross_fitted(noise, np.zeros(40), 0.01, prompts)).mean() < 0.75
    assert agreement(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_the_reward_stays_as_strong():
    answers = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    found = as_strong_as(np.array([0.0, 3.0]), np.array([1.0, 0.0]), answers)
    assert found == pytest.approx([0.0, 0.5])
    assert as_strong_as(np.array([2.0, 0.0]), np.zeros(2), answers).tolist() == [2.0, 0.0]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def pairs(path: Path, count: int = 12) -> Path:
    """People here prefer the answer that says the prompt's words."""
    rows = [json.loads(line) for line in tiny.save_prompts(path, count).read_text().splitlines()]
    for row in rows:
        row |= {"chosen": " " + " ".join(row["prompt"].split()[-2:]), "rejected": " dog dog dog dog"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, output = pairs(tmp_path / "judged.jsonl"), tmp_path / "calibrated.yaml"
    argv = ["calibrate", "--model", str(start), "--data", str(data), "--output", str(output), "--model.device", "cpu"]
    argv += ["--num_generations", "3", "--max_new_tokens", "6"]
    assert main([*argv, "--shrinkage", "1"]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert "Agreement with 12 pairs, each by weights that saw none of its prompt" in told
    assert "# What cagsr calibrate makes of 12 judgements" in output.read_text()
    flags = ["--config", str(output), "--model", "m", "--data", "d", "--output_dir", "o"]
    config = parse_command(TrainConfig, flags, "cagsr train")
    written = yaml.safe_load(output.read_text())["reward"]
    weights = {
        name: getattr(config.reward, name).weight for name in ("grounded_coverage", "self_certainty", "repetition")
    }
    assert weights["self_certainty"] == pytest.approx(written["self_certainty"]["weight"])
    assert weights["self_certainty"] < -0.3  # the model is surer of what people here dislike
    assert weights["grounded_coverage"] < 0.5
    assert weights["repetition"] == -0.3  # repeats nothing in six tokens: no pair tells of it
    assert (config.reward.echo.weight, config.reward.length.weight) == (-5.0, 0.0)  # nobody was asked about these
    # Trusted a million times, the reward's own weights stay as they are.
    assert main([*argv, "--shrinkage", "1e6", "--num_pairs", "8", "--eval_data", str(data)]) == 0
    assert "Agreement with 12 other pairs" in "".join(capsys.readouterr())
    again = parse_command(TrainConfig, ["--config", str(output), *flags[2:]], "cagsr train")
    assert again.reward.grounded_coverage.weight == pytest.approx(1.0, abs=0.01)
    assert again.reward.self_certainty.weight == 0.0
    for flags, sentence in [
        (["--chosen_column", "better"], "no column 'better'"),
        (["--num_pairs", "99"], "there are 12 pairs"),
        (["--reward.normalize", "none"], "within_prompt"),
    ]:
        assert main([*argv, *flags]) == 2
        assert sentence in capsys.readouterr().err


def ranking(prompt: str, *candidates: tuple[str, float, float, float]) -> dict[str, object]:
    """One row of ``cagsr rank``: texts with reward, coverage and repetition."""
    rows = [
        {"completion": text, "reward": reward, "terms": {"coverage": coverage, "repetition": repetition}}
        for text, reward, coverage, repetition in candidates
    ]
    return {"prompt": prompt, "candidates": rows}


def test_people_are_asked_where_terms_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        # More covered and more repeated: the terms disagree, about the first two most.
        ranking("torn", ("much, twice twice", 0.5, 1.0, 0.4), ("little", 0.1, 0.0, 0.0), ("some", 0.2, 0.4, 0.1)),
        ranking("clear", ("good", 1.0, 1.0, 0.0), ("bad", -1.0, 0.0, 0.4)),
        ranking("slightly", ("one", 0.1, 0.4, 0.1), ("two", 0.0, 0.2, 0.0)),
    ]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scales = term_scales([row["candidates"] for row in rows])  # type: ignore[misc]
    assert scales["coverage"] > 0 > scales["repetition"]
    one, two = rows[0]["candidates"][:2]  # type: ignore[index]
    moves = np.array([differences(one, two, scales), differences(two, one, scales)])
    assert disagreement(moves) == pytest.approx(min(scales["coverage"], -0.4 * scales["repetition"]))
    assert disagreement(np.array([[1.0, -2.0, 0.5], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [1.5, 0.0, 0.0]
    found = questions_by_disagreement(str(path), 2)
    assert [(one.prompt, one.a, one.b) for one in found.questions] == [
        ("torn", "much, twice twice", "little"),
        ("slightly", "one", "two"),
    ]
    assert len(questions_by_disagreement(str(path), 1).questions) == 1
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="terms agree on every pair"):
        questions_by_disagreement(str(path), 2)
    path.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(DataError, match="row 1: no candidates with their terms"):
        questions_by_disagreement(str(path), 2)
    assert main(["rate", "serve", "--ranked", str(path), "--pairs", str(path), "--db", str(tmp_path / "r.sqlite")]) == 2
    assert "Give one of these" in capsys.readouterr().err
