"""``cagsr score`` as a user runs it, and the scoring of texts behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cagsr.commands.main import main
from cagsr.config import AttentionConfig, GroundedCoverageConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.rows import split_at_space
from cagsr.reward.answers import AnswerScorer
from cagsr.scoring.answers import encode_response

PAIRS = [
    {"prompt": "tell me about the red cat", "completion": "the red cat sees a bird ."},
    {"prompt": "tell me about the blue dog near a house", "completion": "a dog"},
    {
        "prompt": "tell me about the green tree",
        "completion": "the green tree and the tree and the tree",
        "ended": False,
    },
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(ModelConfig(str(model), device="cpu"), for_training=False)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return save(tmp_path / "pairs.jsonl", PAIRS)


def save(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(model: Path, data: Path, *more: str) -> int:
    return main(["score", "--model", str(model), "--model.device", "cpu", "--data", str(data), *more])


def scored(model: Path, data: Path, *more: str) -> list[dict]:
    out = data.with_suffix(".scores.jsonl")
    assert score(model, data, "--output", str(out), *more) == 0
    return lines(out)


def test_every_term_of_every_row(model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]):
    rows = scored(model, pairs)
    assert set(rows[0]["terms"]) == {
        "coverage", "copy_coverage", "grounded_coverage", "mean_mass", "focus", "echo", "repetition", "self_certainty", "length",
        "history_repetition", "lexical_support", "agreement",
    }  # fmt: skip
    assert set(rows[0]["contributions"]) == {"grounded_coverage", "echo", "repetition"}
    # Seven words and the stop token; no stop token where the row says that the answer was cut.
    assert [row["tokens"] for row in rows] == [8, 3, 9]
    assert [row["ended"] for row in rows] == [True, True, False]
    assert rows[2]["terms"]["length"] == 9
    for row in rows:
        assert row["reward"] == pytest.approx(sum(row["contributions"].values()))
    # Centred over the file.
    assert sum(row["contributions"]["grounded_coverage"] for row in rows) == pytest.approx(0, abs=1e-6)
    said = capsys.readouterr().err
    assert "self_certainty" in said
    assert "on the scales of these 3 answers as a whole" in said


def test_words_and_tokens_explain_the_coverage(model: Path, pairs: Path):
    for row in scored(model, pairs, "--per_token", "--per_word", "--reward.coverage.threshold", "0.2"):
        coverage = row["terms"]["coverage"]
        assert sum(one["coverage_gain"] for one in row["per_token"]) == pytest.approx(coverage, abs=1e-4)
        by_words = sum(one["salience"] * min(1.0, one["attention"] / 0.2) for one in row["per_word"])
        assert by_words == pytest.approx(coverage, abs=1e-4)
        assert len(row["per_token"]) == row["tokens"]


def test_batches_and_padding_change_nothing(model: Path, pairs: Path):
    one, all_together = (scored(model, pairs, "--batch_size", size) for size in ("1", "3"))
    for first, second in zip(one, all_together, strict=True):
        for name, value in first["terms"].items():
            assert value == pytest.approx(second["terms"][name], abs=1e-5), name


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models_score_too(kind: str, tmp_path: Path, pairs: Path):
    rows = scored(tiny.save_model(tmp_path / kind, kind, scale=1.0), pairs)
    assert [row["tokens"] for row in rows] == [8, 3, 9]
    assert all(0 < row["terms"]["coverage"] <= 1 for row in rows)


def test_raw_values_without_normalisation(model: Path, pairs: Path):
    for row in scored(model, pairs, "--reward.normalize", "none", "--reward.grounded_coverage.weight", "2"):
        expected = 2 * row["terms"]["grounded_coverage"] - 0.3 * row["terms"]["repetition"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)


def test_sampled_tokens_are_taken_as_they_are(model: Path, tmp_path: Path):
    row = {"prompt": "tell me about the cat", "completion": "cat", "completion_ids": [6, 6, 2]}
    assert scored(model, save(tmp_path / "ids.jsonl", [row]))[0]["tokens"] == 3


def test_plain_texts_are_cut_in_two(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = save(tmp_path / "texts.jsonl", [{"text": "tell me about the cat and the red dog"}])
    assert score(model, data, "--data.prompt_column", "text") == 2
    said = capsys.readouterr().err
    assert "texts.jsonl, row 1: no response in column 'completion'" in said
    assert "--response_column" in said
    assert "--data.split_text 0.5" in said
    (row,) = scored(model, data, "--data.prompt_column", "text", "--data.split_text", "0.5")
    assert row["prompt"] == "tell me about the cat"
    assert row["completion"] == " and the red dog"


def test_bad_rows_are_named_and_nothing_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.jsonl"
    cases = {
        "row 2: a response of zero tokens": [PAIRS[0], {**PAIRS[1], "completion": ""}],
        "row 2: no response in column": [PAIRS[0], {"prompt": "the cat"}],
        "row 2: column 'completion': Expected text": [PAIRS[0], {**PAIRS[1], "completion": True}],
        "row 1: prompt and response have 68 tokens, more than the model's context of 64": [
            {"prompt": "tell me about the cat", "completion": "dog " * 61}
        ],
    }
    for sentence, rows in cases.items():
        assert score(model, save(tmp_path / "bad.jsonl", rows), "--output", str(out)) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert "bad.jsonl" in said
    assert not out.exists()


def test_long_pairs_are_dropped_cut_or_truncated_on_demand(model: Path, tmp_path: Path):
    long = {"prompt": "tell me about the cat", "completion": "dog " * 62}
    data = save(tmp_path / "long.jsonl", [PAIRS[0], long])
    assert len(scored(model, data, "--data.long_prompts", "drop")) == 1
    cut = scored(model, data, "--max_response_length", "5")
    assert [row["tokens"] for row in cut] == [5, 5]
    assert not cut[1]["ended"]
    wordy = save(tmp_path / "wordy.jsonl", [{"prompt": "tell me about the cat " * 20, "completion": "dog"}])
    assert len(scored(model, wordy, "--data.long_prompts", "truncate")) == 1


def test_an_own_function_is_scored_and_may_not_apply(model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch):
    (pairs.parent / "own_terms.py").write_text(
        "def cats(prompts, completions, **columns):\n"
        "    return [None if 'tree' in text else float(text.count('cat')) for text in completions]\n"
    )
    monkeypatch.chdir(pairs.parent)
    monkeypatch.syspath_prepend(str(pairs.parent))
    rows = scored(model, pairs, "--reward.functions", "own_terms.cats")
    assert [row["terms"]["cats"] for row in rows] == [1.0, 0.0, None]
    assert [row["contributions"]["cats"] for row in rows] == pytest.approx([1.0, -1.0, 0.0])


def test_weights_change_the_reward_not_the_terms(loaded: LoadedModel):
    reward = RewardConfig(grounded_coverage=GroundedCoverageConfig(weight=0.0, threshold=0.2))
    scorer = AnswerScorer(loaded, reward, AttentionConfig(), SalienceConfig())
    prompts = encode_texts(["tell me about the red cat"], loaded.tokenizer, SalienceConfig(), 60)
    ((_, values),) = scorer.score_texts(prompts, [encode_response(loaded, prompts[0], "the cat")])
    assert scorer.weights["grounded_coverage"] == 0.0
    assert float(values["grounded_coverage"][0]) > 0


def test_the_stop_token_is_never_doubled(loaded: LoadedModel):
    (prompt,) = encode_texts(["tell me about the cat"], loaded.tokenizer, SalienceConfig(), 60)
    assert encode_response(loaded, prompt, "dog <eos>").ids == encode_response(loaded, prompt, "dog").ids
    assert encode_response(loaded, prompt, " dog", ended=False).ids == encode_response(loaded, prompt, "dog").ids[:-1]
    assert encode_response(loaded, prompt, "").ids == ()
    assert encode_response(loaded, prompt, "dog dog", limit=1) == encode_response(
        loaded, prompt, "dog dog", ended=False, limit=1
    )


@given(st.text(alphabet="ab \n", min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_a_split_text_loses_nothing_and_never_cuts_a_word(text: str, share: float):
    prompt, rest = split_at_space(text, share)
    assert prompt + rest == text
    assert prompt
    assert rest == "" or rest[0].isspace()
