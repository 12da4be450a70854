"""``cagsr diagnose`` as a user runs it, and the statistics and advice behind it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cagsr.attention import PromptAttentionReader
from cagsr.commands.main import main
from cagsr.config import AttentionConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig, TrainConfig
from cagsr.diagnosis.best_of_n import best_of_n_gain, correlation, oracle_share, picked, within_share
from cagsr.diagnosis.diagnose import diagnose, warnings_for
from cagsr.diagnosis.recommend import (
    LENGTH,
    Recommendation,
    against_length,
    fit_weights,
    training_weights,
    weighted_parts,
    within_z,
    yaml_of,
)
from cagsr.diagnosis.signals import Setting, SignalReader, Signals, collect_signals, layer_choices
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.models.load import load_model
from cagsr.parse import parse_command
from cagsr.prompts.prepare import encode_texts
from cagsr.reward.answers import AnswerScorer
from cagsr.rollout.sample_prompts import sample_in_batches

HERE = Setting("last-2", "sum", 0.3)
WEIGHTS = {"coverage": 1.0, "repetition": -1.0, "self_certainty": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tiny.save_prompts(tmp_path / "prompts.jsonl", 8)


def run(model: Path, data: Path, *more: str) -> int:
    small = ["--num_prompts", "4", "--num_generations", "3", "--max_new_tokens", "6", "--model.device", "cpu"]
    return main(["diagnose", "--model", str(model), "--data", str(data), *small, *more])


def make_signals(seed: int = 0, prompts: int = 40, candidates: int = 8, **changes: object) -> Signals:
    """Random signals of which coverage and self-certainty each see half of the truth."""
    g = np.random.default_rng(seed)
    a, b, noise = (g.normal(size=(prompts, candidates)) for _ in range(3))
    coverage = {
        Setting(layers, "sum", tau): 0.5 + 0.05 * (a if layers == "last-2" else noise)
        for layers in ("last-2", "0")
        for tau in (0.1, 0.3)
    }
    flat = g.normal(size=(prompts, candidates)) * 0.01
    terms = {
        "coverage": coverage[HERE], "copy_coverage": flat, "grounded_coverage": flat, "mean_mass": flat, "focus": flat,
        "repetition": np.abs(flat), "self_certainty": 5 + b, "length": 20 + noise,
    }  # fmt: skip
    given: dict = {
        "terms": terms,
        "coverage": coverage,
        "by_layers": {
            name: {"copy_coverage": flat, "grounded_coverage": flat, "mean_mass": flat, "focus": flat}
            for name in ("last-2", "0")
        },
        "configured": HERE,
        "length": 20 + noise,
        "repetition": np.abs(flat),
        "ended": np.ones((prompts, candidates)),
        "prompts": tuple(EncodedPrompt(Prompt(i + 1, f"cat {i}"), (1,), (0,), (1.0,)) for i in range(prompts)),
        "completions": tuple(tuple(f"{i} {j}" for j in range(candidates)) for i in range(prompts)),
        "truth": a + b,
        "truth_name": "judge",
    }
    return Signals(**{**given, **changes})


# ---- statistics, by hand ----


def test_picking_and_its_gain_by_hand():
    truth = np.array([[0.0, 1.0], [0.2, 0.6], [0.5, 0.5]])
    scores = np.array([[0.1, 0.9], [2.0, 1.0], [3.0, 3.0]])
    assert picked(scores, truth).tolist() == [1.0, 0.2, 0.5]
    # Gains +0.5, -0.2, 0; an oracle's +0.5, +0.2, 0.
    assert best_of_n_gain(scores, truth).mean == pytest.approx(0.1)
    share = oracle_share(scores, truth)
    assert share.mean == pytest.approx(0.3 / 0.7)
    assert share.low <= share.mean <= share.high
    assert oracle_share(truth, truth).low == pytest.approx(1.0)
    assert oracle_share(scores, np.ones((3, 2))).mean == 0.0


def test_ties_share_and_missing_scores_are_never_picked():
    truth = np.array([[0.0, 0.6, 0.9], [0.3, 0.6, 0.9]])
    assert picked(np.array([[1.0, 1.0, 0.0], [np.nan, np.nan, np.nan]]), truth) == pytest.approx([0.3, 0.6])
    assert picked(np.array([[np.nan, 0.1, np.nan], [1.0, np.nan, 0.0]]), truth) == pytest.approx([0.6, 0.3])


def test_correlation_sees_only_what_lies_within_prompts():
    # Between the prompts the two agree perfectly, within them they disagree.
    x = np.array([[0.0, 1.0], [10.0, 11.0]])
    y = np.array([[1.0, 0.0], [11.0, 10.0]])
    assert correlation(x, y) == pytest.approx(-1.0)
    # Variances within 1/4, in total 1/4 + 25.
    assert within_share(x) == pytest.approx(0.25 / 25.25)
    assert within_share(np.ones((2, 2))) == 0.0
    with pytest.raises(ValueError, match="shape"):
        correlation(x, y[:1])


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 5))
def test_an_oracle_gains_most(seed: int, prompts: int, candidates: int):
    g = np.random.default_rng(seed)
    scores, truth = g.normal(size=(2, prompts, candidates))
    assert best_of_n_gain(scores, truth).mean <= best_of_n_gain(truth, truth).mean + 1e-12
    assert oracle_share(-truth, truth).mean <= 0.0


def test_weights_are_found_and_small_ones_left_out():
    g = np.random.default_rng(0)
    a, b, c = g.normal(size=(3, 200, 8))
    found = fit_weights({"a": 3 * a, "b": b, "c": c, "none": np.ones((200, 8))}, 2 * a + b)
    assert set(found) == {"a", "b"}
    assert found["a"] / found["b"] == pytest.approx(2.0, rel=0.05)
    assert fit_weights({"a": -a}, a) == {}


def test_training_weights_give_the_reward_a_deviation_of_one_within_a_prompt():
    a, b = np.random.default_rng(1).normal(size=(2, 500, 4))
    columns = {"a": a + 9 * np.arange(500)[:, None], "b": 3 * b}  # neither level nor scale matters
    weights = training_weights({"a": 3.0, "b": 4.0}, columns)
    assert weights["b"] / weights["a"] == pytest.approx(4 / 3, rel=0.05)
    reward = sum(weighted_parts(columns, weights, RewardConfig(clip=0)).values())
    # Three of four deviations within a prompt are free.
    assert np.std(reward) * np.sqrt(4 / 3) == pytest.approx(1.0, rel=0.05)
    assert training_weights({"a": 1.0}, {"a": np.ones((2, 2))}) == {}


# ---- advice ----


def test_a_recommendation_with_a_checker_finds_both_signals():
    found = diagnose(make_signals(), WEIGHTS)
    weights = found.recommendation.weights
    assert weights["coverage"] > 0.3
    assert weights["self_certainty"] > 0.3
    assert weights["repetition"] < 0
    assert found.recommendation.setting == HERE
    assert "judge" in " ".join(found.recommendation.reasons)
    named = {signal.name: signal for signal in found.signals}
    assert named["recommended reward"].truth > named["coverage"].truth > 0.4
    assert named["coverage + self_certainty"].oracle_share.mean > 0.8


def test_bad_layers_are_left_for_better_ones():
    signals = make_signals()
    configured = Setting("0", "sum", 0.3)
    terms = {**signals.terms, "coverage": signals.coverage[configured]}
    found = diagnose(make_signals(configured=configured, terms=terms), WEIGHTS)
    assert found.recommendation.setting.layers == "last-2"


def test_without_a_checker_the_recommendation_says_what_it_rests_on():
    found = diagnose(make_signals(truth=None), WEIGHTS)
    assert "not on truth" in " ".join(found.recommendation.reasons)
    assert found.truth_mean is None
    assert all(signal.truth is None for signal in found.signals)


@pytest.mark.parametrize(
    ("changes", "weights", "sentence"),
    [
        ({"length": -1}, {"coverage": 1.0}, "pays for short answers"),
        ({"length": 1}, {"coverage": 1.0}, "pays for long answers"),
        ({"ended": 0}, WEIGHTS, "0% of the answers end by themselves"),
        ({"coverage": 0.97}, WEIGHTS, "saturated (mean 0.97 at threshold 0.3): raise the threshold"),
        ({"coverage": 0.02}, WEIGHTS, "lower the threshold"),
        ({"between": 9.0}, {"coverage": 1.0}, "coverage hardly varies within a prompt (1%"),
        ({}, {"coverage": 1.0, "self_certainty": 0.05}, "One term dominates: coverage"),
        ({"same": 1}, WEIGHTS, "mostly the same (12% differ)"),
        ({"truth": 0}, WEIGHTS, "hardly sees judge"),
        ({"truth": 1}, WEIGHTS, "judge says the same of all answers"),
        ({"truth": 2}, WEIGHTS, "judge is the length of an answer and nothing else"),
        ({"repeats": 1}, {"coverage": 1.0}, "pays for repetition"),
    ],
)
def test_warnings_in_plain_words(changes: dict, weights: dict, sentence: str):
    signals = make_signals()
    coverage = signals.terms["coverage"]
    more: dict = {}
    match next(iter(changes.items()), None):
        case ("length", sign):
            more["length"] = 20 + sign * within_z(coverage)
        case ("ended", value):
            more["ended"] = np.full(coverage.shape, value)
        case ("coverage", mean):
            more["terms"] = {**signals.terms, "coverage": mean + 0.01 * within_z(coverage)}
        case ("between", size):
            shift = size * np.random.default_rng(3).normal(size=(coverage.shape[0], 1))
            more["terms"] = {**signals.terms, "coverage": within_z(coverage) + shift}
        case ("same", _):
            more["completions"] = tuple(("one",) * len(texts) for texts in signals.completions)
        case ("truth", 0):
            more["truth"] = np.random.default_rng(5).normal(size=coverage.shape)
        case ("truth", 2):
            more["truth"] = 3 * signals.length
        case ("truth", _):
            more["truth"] = np.ones_like(coverage)
        case ("repeats", _):
            more["repetition"] = within_z(coverage)
    assert any(sentence in warning for warning in warnings_for(make_signals(**more), weights))
    quiet = warnings_for(signals, {"coverage": 1.0, "self_certainty": 1.0})
    assert not any(sentence in warning for warning in quiet)


# ---- measuring ----


def test_layer_choices_are_listed_once():
    assert layer_choices([0, 1, 2], "last-2") == {
        "last-2": (1, 2),
        "all": (0, 1, 2),
        "last-1": (2,),
        "0": (0,),
        "1": (1,),
    }


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_sweep_gives_what_the_scorer_gives(kind: str, tmp_path: Path):
    path = tiny.save_model(tmp_path / kind, kind, scale=1.0 if kind == "t5" else 4.0)
    loaded = load_model(ModelConfig(str(path), device="cpu"), for_training=False)
    texts = ["tell me about the red cat", "tell me about the blue dog near a house", "the bird"]
    prompts = encode_texts(texts, loaded.tokenizer, SalienceConfig(), 50)
    sampling, attention = SamplingConfig(num_generations=2, max_new_tokens=5), AttentionConfig(layers="last-2")
    scorer = AnswerScorer(loaded, RewardConfig(), attention, SalienceConfig())
    before = torch.random.get_rng_state()
    signals = collect_signals(SignalReader(loaded, scorer, attention), prompts, sampling, seed=3, chunk=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert signals.length.shape == (3, 2)
    np.testing.assert_allclose(signals.coverage[signals.configured], signals.terms["coverage"], atol=1e-6)
    # All layers in one reading, as training reads them, against the mean of layers read one by one.
    for (_, episodes), rows in zip(
        sample_in_batches(loaded, prompts, sampling, 3, 2), (slice(0, 2), slice(2, 3)), strict=True
    ):
        for name, value in scorer.values(scorer.batch(episodes)).items():
            np.testing.assert_allclose(signals.terms[name][rows].ravel(), value.numpy(), atol=1e-5, err_msg=name)
    assert PromptAttentionReader(loaded.model, layers="all").layers == (0, 1)


# ---- the command ----


def test_a_report_a_config_and_all_numbers(model: Path, prompts: Path, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "own_checker.py").write_text(
        "def letters(prompts, completions, **columns):\n    return [sum(map(ord, text)) % 7 for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    out, markdown = tmp_path / "diagnosis.json", tmp_path / "diagnosis.md"
    flags = ["--checker", "own_checker.letters", "--output", str(out), "--markdown", str(markdown)]
    assert run(model, prompts, *flags) == 0
    said = capsys.readouterr().out
    assert "Truth: own_checker.letters" in said
    assert "Recommendation:" in said
    numbers = json.loads(out.read_text())
    assert (numbers["prompts"], numbers["candidates"]) == (4, 3)
    assert {"coverage", "configured reward", "recommended reward"} <= {one["name"] for one in numbers["signals"]}
    assert "## Recommendation" in markdown.read_text()
    recommended = out.with_suffix(".yaml")
    assert recommended.read_text().startswith("# What cagsr diagnose recommends")
    argv = ["--config", str(recommended), "--model", "m", "--data", "d", "--output_dir", "o"]
    config = parse_command(TrainConfig, argv, "cagsr train")
    assert config.reward.repetition.weight == pytest.approx(numbers["recommendation"]["weights"]["repetition"])


def test_the_recommendation_is_the_reward_that_was_measured():
    found = Recommendation(Setting("last-2", "sum", 0.2), {"grounded_coverage": 1.0, "repetition": -0.3}, ("why",))
    attention = AttentionConfig(layers="all", heads="0,1")
    measured = RewardConfig(
        grounded_coverage=dataclasses.replace(RewardConfig().grounded_coverage, threshold=0.25, weight=7.0),
        repetition=dataclasses.replace(RewardConfig().repetition, n=4),
        associations=dataclasses.replace(RewardConfig().associations, min_count=9),
    )
    written = yaml_of(found, attention, measured)
    assert written["attention"] == {"heads": "0,1", "layers": "last-2"}
    assert written["reward"]["grounded_coverage"] == {"threshold": 0.25, "weight": 1.0}
    assert written["reward"]["repetition"] == {"n": 4, "weight": -0.3}
    assert written["reward"]["coverage"] == {"weight": 0.0, "threshold": 0.2}
    assert written["reward"]["associations"] == {"min_count": 9}


def test_where_nothing_helps_no_config_is_written(model: Path, prompts: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(
        "cagsr.diagnosis.diagnose.recommend",
        lambda signals, configured, weights: Recommendation(signals.configured, {}, ("why",)),
    )
    out = tmp_path / "diagnosis.json"
    out.with_suffix(".yaml").write_text("reward: {}\n")  # of another diagnosis
    assert run(model, prompts, "--output", str(out)) == 0
    assert out.exists()
    assert not out.with_suffix(".yaml").exists()
    said = capsys.readouterr().err
    assert "nothing is recommended" in said
    assert "--config" not in said


def test_association_terms_are_left_out_with_few_prompts(model: Path, prompts: Path, capsys):
    assert run(model, prompts, "--reward.unsupported.weight", "-1") == 0
    assert "those terms are left out" in capsys.readouterr().err.replace("\n", " ")


def test_references_give_rouge_and_none_is_said(model: Path, tmp_path: Path, prompts: Path, capsys):
    rows = [json.loads(line) | {"references": ["a cat", "the red dog"]} for line in prompts.read_text().splitlines()]
    data = tmp_path / "references.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(model, data) == 0
    assert "Truth: ROUGE-L against references" in capsys.readouterr().out
    assert run(model, prompts) == 0
    said = capsys.readouterr().out
    assert "No truth" in said
    assert "not on truth" in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_generations", "1"], "--sampling.num_generations 2 or more"),
        (["--sampling.temperature", "0"], "--sampling.temperature above 0"),
        (["--num_prompts", "1"], "--num_prompts 1: must be 2 or more"),
        (["--checker", "nowhere.at.all"], "--checker: 'nowhere.at.all' names no module"),
        (["--checker", "math.pi"], "--checker math.pi: is float, not a function"),
        (["--checker", "math.sqrt"], "The metric math.sqrt failed with TypeError"),
        (["--attention.layers", "7"], "layer 7"),
        (["--data.prompt_column", "text"], "row 1: no column 'text'"),
        (["--reward.coverage.threshold", "0"], "threshold"),
        (["--output", "diagnosis.yaml"], "names of their own"),
        (["--output", "a.json", "--markdown", "a.yaml"], "names of their own"),
    ],
)
def test_bad_input_is_one_sentence(model: Path, prompts: Path, capsys, flags: list[str], sentence: str):
    assert run(model, prompts, *flags) == 2
    assert sentence in capsys.readouterr().err


def test_recommended_weights_hold_the_correlation_with_length() -> None:
    g = np.random.default_rng(0)
    length = g.normal(size=(60, 8))
    reward = 0.8 * length + 0.6 * g.normal(size=(60, 8))
    weight = against_length(reward, length)
    assert weight < 0
    left = within_z(reward) + weight * within_z(length)
    assert correlation(left, length) == pytest.approx(LENGTH, abs=1e-6)
    # By hand: a correlation of 0.6 leaves 0.6 - 0.2 sqrt(0.64 / 0.96) = 0.4367.
    a, b = np.array([[1.0, 1.0, -1.0, -1.0]]), np.array([[1.0, -1.0, 1.0, -1.0]])
    assert against_length(0.6 * a + 0.8 * b, a) == pytest.approx(-0.4367, abs=1e-4)
    assert against_length(b, a) == against_length(-a, a) == 0.0
    scaled = training_weights({"x": 2.0}, {"x": 0.6 * a + 0.8 * b}, a)
    assert scaled["length"] == pytest.approx(-0.44)
