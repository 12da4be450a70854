"""All measures of single answers, and two models' answers held against each other."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

import tiny
from cagsr.errors import ConfigError, ModelError
from cagsr.evaluation.judge_answers import AnswerJudge
from cagsr.evaluation.judged_policies import Evaluated, compare, corrected, evaluate_answers
from cagsr.evaluation.judges import Judges
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.reward.model import load_reward_model


def asked(text: str, row: int = 1, **columns: Any) -> EncodedPrompt:
    return EncodedPrompt(Prompt(row, text, columns=columns), (), (), ())


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], str]:
    """Make a function importable; returns its dotted path."""

    def put(function: Callable[..., Any]) -> str:
        module = types.ModuleType("tiny_checks")
        module.quality = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tiny_checks", module)
        return "tiny_checks.quality"

    return put


def save_reward_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    settings = tiny.config("llama")
    settings.num_labels = 1
    LlamaForSequenceClassification(settings).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_without_any_judge_the_texts_alone_are_measured() -> None:
    prompts = [asked("the cat", references=["a cat sat", "the cat ran"]), asked("the dog")]
    found = AnswerJudge(Judges()).measure(prompts, ["the cat ran", "a bird a bird a bird"])
    assert set(found) == {"rouge_l", "lexical_relevance", "repetition", "words"}
    np.testing.assert_array_equal(found["rouge_l"], [1.0, np.nan])
    # "the" is in every prompt and weighs nothing.
    np.testing.assert_array_equal(found["lexical_relevance"], [1.0, 0.0])
    np.testing.assert_array_equal(found["words"], [3, 6])
    assert found["repetition"][1] == pytest.approx(1 - 2 / 4)
    assert all(values.dtype == np.float64 for values in found.values())


def test_a_checker_of_numbers_sees_prompts_answers_and_columns(checker) -> None:
    def quality(prompts, completions, **columns):
        return [len(p) + len(c) + (t or 0) for p, c, t in zip(prompts, completions, columns["target"], strict=True)]

    judge = AnswerJudge(Judges(checker=checker(quality)))
    found = judge.measure([asked("the cat", target=100), asked("a")], ["ab", "c"])
    np.testing.assert_array_equal(found["quality"], [109, 2])


def test_a_checker_of_dicts_gives_several_measures_with_gaps(checker) -> None:
    def quality(prompts, completions, **columns):
        return [{"missed": 1, "added": None}, {"missed": 0.5, "added": 2, "wrong": True}]

    found = AnswerJudge(Judges(checker=checker(quality))).measure([asked("a"), asked("b")], ["x", "y"])
    np.testing.assert_array_equal(found["missed"], [1, 0.5])
    np.testing.assert_array_equal(found["added"], [np.nan, 2])
    np.testing.assert_array_equal(found["wrong"], [np.nan, 1])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1], "gave 1 values for 2 answers"),
        ([1, "x"], "'quality' holds something that is no number"),
        ([1, math.inf], "infinite"),
        ([{"words": 1}, {"words": 2}], "'words' is the name of a measure of ours"),
        (None, "failed with TypeError"),
    ],
)
def test_a_checker_that_will_not_do(checker, values: Any, sentence: str) -> None:
    judge = AnswerJudge(Judges(checker=checker(lambda prompts, completions, **columns: values)))
    with pytest.raises(ConfigError, match=sentence) as caught:
        judge.measure([asked("a"), asked("b")], ["x", "y"])
    assert str(caught.value).startswith("--checker tiny_checks.quality: ")


def test_checkers_that_are_none(checker) -> None:
    with pytest.raises(ConfigError, match="--checker"):
        AnswerJudge(Judges(checker="no_such_module.quality"))
    with pytest.raises(ConfigError, match="not a function"):
        AnswerJudge(Judges(checker=checker("text")))  # type: ignore[arg-type]


def test_model_judges_are_the_models_own_numbers(tmp_path: Path) -> None:
    judge_model, reward_model = tiny.save_model(tmp_path / "judge"), save_reward_model(tmp_path / "reward")
    judge = AnswerJudge(Judges(judge_model=str(judge_model), reward_model=str(reward_model)), "cpu")
    prompts = [asked("the cat", follow_up="a dog", references=["a tree"]), asked("the dog", references=["the cat"])]
    found = judge.measure(prompts, ["sees a bird", "near the house"])
    # follow_up goes before references, for all rows: the second has none.
    np.testing.assert_allclose(found["follow_up_perplexity"], np.exp(found["follow_up_nll"]))
    assert np.isfinite(found["follow_up_nll"][0])
    assert np.isnan(found["follow_up_nll"][1])
    own = load_reward_model(str(reward_model), "cpu").score(
        [p.prompt for p in prompts], ["sees a bird", "near the house"]
    )
    np.testing.assert_allclose(found["reward_model"], own.numpy(), rtol=1e-6)
    named = AnswerJudge(Judges(judge_model=str(judge_model), follow_up_column="references"), "cpu")
    assert np.isfinite(named.measure(prompts, ["sees a bird", "near the house"])["follow_up_nll"]).all()
    with pytest.raises(ConfigError, match="--follow_up_column next: no row"):
        AnswerJudge(Judges(judge_model=str(judge_model), follow_up_column="next"), "cpu").measure(prompts, ["a", "b"])


def test_models_that_are_none_are_named_by_their_flag(tmp_path: Path) -> None:
    for name in ("judge_model", "reward_model", "embedding_model"):
        with pytest.raises(ModelError, match=f"^--{name}"):
            AnswerJudge(Judges(**{name: str(tmp_path / "none")}))


def test_what_is_left_out_is_said() -> None:
    said = "; ".join(AnswerJudge(Judges()).left_out([asked("the cat")]))
    for flag in ("no row has references", "--checker", "--embedding_model", "--judge_model"):
        assert flag in said
    assert "ROUGE" not in "; ".join(AnswerJudge(Judges()).left_out([asked("the cat", reference="a dog")]))


def judged(answers: list[list[str]], **more: Any) -> Evaluated:
    prompts = [asked("the cat", 1, references=["the cat sat"]), asked("the dog", 2)]
    return evaluate_answers("greedy", 0.0, prompts, answers, AnswerJudge(Judges()), **more)


def test_values_are_means_over_a_prompts_answers() -> None:
    found = judged([["the cat sat", "the cat"], ["a a", "b"]], more={"tokens": np.array([4.0, 2.0, 3.0, np.nan])})
    np.testing.assert_allclose(found.values["words"], [2.5, 1.5])
    np.testing.assert_allclose(found.values["tokens"], [3, 3])
    np.testing.assert_allclose(found.values["rouge_l"], [(1 + 0.8) / 2, np.nan])
    assert found.interval("rouge_l") is not None
    assert set(found.values) >= {"self_bleu"}
    # One answer each: (the cat sat, a a) and (the cat, b).
    assert found.of_set["distinct_1"] == pytest.approx((4 / 5 + 3 / 3) / 2)
    assert "self_bleu" not in judged([["a"], ["b"]]).values


def test_a_comparison_is_paired_and_leaves_out_what_a_side_lacks() -> None:
    mine = judged([["the cat sat"], ["a b c d"]], more={"extra": np.array([1.0, 2.0])})
    theirs = judged([["the dog ran"], ["a b"]])
    found = {one.measure: one for one in compare("both", mine, theirs).differences}
    assert "extra" not in found
    assert found["words"].difference.mean == pytest.approx(1.0)
    assert found["words"].p is None
    rouge = found["rouge_l"]
    assert (rouge.mine.mean, rouge.theirs.mean) == (1.0, pytest.approx(1 / 3))
    assert np.isnan(rouge.values[1])
    assert rouge.p == 1.0  # one pair tells nothing


def test_win_rates_join_the_comparison() -> None:
    mine, theirs = judged([["a"], ["b"]]), judged([["c"], ["d"]])
    object.__setattr__(mine, "scores", (np.array([2.0]), np.array([1.0])))
    object.__setattr__(theirs, "scores", (np.array([1.0]), np.array([1.0])))
    won = next(one for one in compare("both", mine, theirs).differences if one.measure == "win_rate")
    assert (won.mine.mean, won.theirs.mean, won.difference.mean) == (0.75, 0.25, 0.5)


def test_all_tests_of_an_evaluation_are_corrected_together() -> None:
    mine, theirs = judged([["the cat sat"], ["a b c d"]]), judged([["dog"], ["dog"]])
    one = compare("one", mine, theirs)
    alone, pair = corrected([one])[0], corrected([one, one])
    tests = [d for d in alone.differences if d.p is not None]
    assert all(d.p_holm is None for d in alone.differences if d.p is None)
    smallest = min(tests, key=lambda d: d.p)
    assert smallest.p_holm == pytest.approx(min(1.0, len(tests) * smallest.p))
    both = next(d for d in pair[1].differences if d.measure == smallest.measure)
    assert both.p_holm == pytest.approx(min(1.0, 2 * len(tests) * smallest.p))
