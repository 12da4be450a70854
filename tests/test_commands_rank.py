"""``cagsr rank`` as a user runs it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

import tiny
from cagsr.commands.main import main
from cagsr.config import RewardConfig
from cagsr.models.texts import token_texts
from cagsr.reward.build import weighted_terms
from cagsr.reward.function import RewardFunction
from cagsr.reward.registry import Resources
from cagsr.reward.weigh import weigh

OFF = ["--reward.grounded_coverage.weight", "0", "--reward.repetition.weight", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", 4)


def rank(model: Path, *more: str) -> int:
    return main(["rank", "--model", str(model), "--model.device", "cpu", "--max_new_tokens", "6", *more])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_comes_first_with_all_candidates(model: Path, prompts: Path, tmp_path: Path):
    out = tmp_path / "best.jsonl"
    assert rank(model, "--data", str(prompts), "--num_generations", "5", "--output", str(out)) == 0
    rows = lines(out)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in lines(prompts)]
    for row in rows:
        rewards = [candidate["reward"] for candidate in row["candidates"]]
        assert len(rewards) == 5
        assert rewards == sorted(rewards, reverse=True)
        assert row["completion"] == row["candidates"][0]["completion"]
        assert row["reward"] == rewards[0]
        # Centred within the prompt.
        assert statistics.mean(rewards) == pytest.approx(0, abs=1e-6)


def test_the_order_is_that_of_the_term(model: Path, prompts: Path, tmp_path: Path):
    out = tmp_path / "best.jsonl"
    flags = [*OFF, "--reward.length.weight", "-1"]
    assert rank(model, "--data", str(prompts), "--num_generations", "6", "--output", str(out), *flags) == 0
    for row in lines(out):
        lengths = [candidate["tokens"] for candidate in row["candidates"]]
        assert lengths == sorted(lengths)


def test_rank_and_score_agree_on_the_terms(model: Path, prompts: Path, tmp_path: Path):
    best, answers, scores = (tmp_path / name for name in ("best.jsonl", "answers.jsonl", "scores.jsonl"))
    same = ["--model", str(model), "--model.device", "cpu", "--data"]
    alike = ["--salience.weighting", "uniform"]  # the answers' file holds each prompt three times: another IDF
    sampled = [str(prompts), "--num_generations", "3", "--max_new_tokens", "6", "--seed", "5"]
    assert main(["rank", *same, *sampled, *alike, "--output", str(best)]) == 0
    assert main(["generate", *same, *sampled, "--token_ids", "--output", str(answers)]) == 0
    assert main(["score", *same, str(answers), *alike, "--output", str(scores)]) == 0
    found: dict[tuple[str, str, int], dict] = {}
    for row in lines(best):
        for one in row["candidates"]:
            found[row["prompt"], one["completion"], one["tokens"]] = one["terms"]
    scored = lines(scores)
    assert len(scored) == 12
    for row in scored:
        terms = found[row["prompt"], row["completion"], row["tokens"]]
        for name in ("self_certainty", "copy_coverage", "repetition", "coverage"):
            assert row["terms"][name] == pytest.approx(terms[name], abs=1e-4), name


def test_given_candidates_are_ranked(model: Path, tmp_path: Path):
    data, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    texts = ["the red cat", "a dog . a dog . a dog . a dog", "a bird"]
    rows = [{"prompt": "tell me about the red cat", "answers": texts}, {"prompt": "the dog", "answers": texts[:2]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--candidates_column", "answers", "--reward.grounded_coverage.weight", "0"]
    assert rank(model, "--data", str(data), "--output", str(out), *flags) == 0
    first, second = lines(out)
    assert sorted(one["completion"] for one in first["candidates"]) == sorted(texts)
    assert first["candidates"][-1]["completion"] == texts[1]  # the one that repeats itself
    assert len(second["candidates"]) == 2


def test_one_prompt_is_shown_as_a_table(model: Path, capsys: pytest.CaptureFixture[str]):
    assert rank(model, "--prompt", "tell me about the red cat", "--num_generations", "3") == 0
    said = capsys.readouterr().out
    assert "grounded_coverage" in said
    assert "answer" in said
    assert "{" not in said


def test_bad_input_is_one_sentence(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "the cat", "answers": ["a dog", ""]}) + "\n")
    cases = {
        "needs 2 answers or more": ["--prompt", "the cat", "--num_generations", "1"],
        "row 1: column 'answers' must hold a list": ["--data", str(prompts), "--candidates_column", "answers"],
        "row 1: candidate 2 is a response of zero tokens": ["--data", str(empty), "--candidates_column", "answers"],
        "can't be used with --prompt": ["--prompt", "the cat", "--candidates_column", "answers"],
        "the reward is empty": ["--prompt", "the cat", *OFF],
    }
    for sentence, flags in cases.items():
        assert rank(model, *flags) == 2
        assert sentence in capsys.readouterr().err


def test_the_scale_is_that_of_training(make_reward_batch):
    """Candidates are weighed as training weighs them: the reward function and ``weigh`` give the same contributions."""
    batch = make_reward_batch(seed=3, prompts=4, generations=5)
    resources = Resources(texts=token_texts(tiny.tokenizer()))
    terms = weighted_terms(RewardConfig(), "cpu", resources, every=True)
    weights = {term.name: float(number + 1) for number, (term, _) in enumerate(terms)}
    function = RewardFunction([term for term, _ in terms], list(weights.values()), "within_prompt", clip=1.5)
    reward = function(batch)
    weighed = weigh(reward.terms, weights, RewardConfig(clip=1.5), batch.episodes.prompts.group)
    for name, part in weighed.contributions.items():
        torch.testing.assert_close(part.float(), reward.contributions[name], atol=1e-5, rtol=1e-5, msg=name)
