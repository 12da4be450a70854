"""Chains of thought: where steps end, which tokens they are, and that each is judged by what stands before it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cagsr.commands.main import main
from cagsr.config import ModelConfig, SalienceConfig, StepsConfig, validate
from cagsr.errors import ConfigError, RolloutError
from cagsr.flow import EncodedPrompt, EpisodeBatch, PromptBatch, Readings, RewardBatch
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.function import RewardFunction
from cagsr.reward.terms.exact_match import ExactMatch, ExactMatchConfig
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import cut_responses
from cagsr.rollout.step_player import StepPlayer
from cagsr.tasks.segments import SegmentEncoder
from cagsr.tasks.steps import splitter
from test_tasks import ids_of

UNIFORM = SalienceConfig(weighting="uniform")


def steps(text: str, **settings: Any) -> list[str]:
    split = splitter(StepsConfig(**settings))
    assert split is not None
    ends = [0, *split(text)]
    assert ends[-1] == len(text)
    return [text[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"by": "lines"}, "4+4=8\n\n8*2=16\nSo 16.", ["4+4=8\n\n", "8*2=16\n", "So 16."]),
        ({"by": "lines"}, "one\n", ["one\n"]),  # nothing is said behind the break
        ({"by": "lines"}, "\n \none", ["\n \none"]),  # nor before it
        ({"by": "lines"}, "", [""]),
        ({"by": "paragraphs"}, "a\nb\n\nc\n  \n d", ["a\nb\n\n", "c\n  \n ", "d"]),
        ({"by": "sentences"}, "It is 3.5 kg. So e.g. two! Then? 7", ["It is 3.5 kg. ", "So e.g. two! ", "Then? ", "7"]),
        ({"by": "delimiter", "delimiter": "=>"}, "a=>b=>", ["a=>", "b=>"]),
        ({"by": "lines", "most": 2}, "a\nb\nc", ["a\n", "b\nc"]),
        ({"by": "lines", "tag": "think"}, "<think>a\nb</think>\nThe\nend", ["<think>a\n", "b</think>", "\nThe\nend"]),
        ({"by": "lines", "tag": "think"}, "a\nb", ["a\n", "b"]),
        ({"by": "function", "function": "test_steps.in_pairs"}, "abcde", ["ab", "cd", "e"]),
    ],
)
def test_where_steps_end(settings: dict[str, Any], text: str, expected: list[str]):
    assert steps(text, **settings) == expected


def in_pairs(text: str) -> list[str]:
    return [text[start : start + 2] for start in range(0, len(text), 2)]


def shouted(text: str) -> list[str]:
    return [text.upper()]


@given(st.text("ab.\n! 3", max_size=40), st.sampled_from(["lines", "paragraphs", "sentences"]), st.integers(1, 5))
def test_steps_are_the_text_and_each_says_something(text: str, by: str, most: int):
    found = steps(text, by=by, most=most)
    assert "".join(found) == text
    assert len(found) <= most
    assert all(one.strip() for one in found) or not text.strip()


def test_what_can_not_be_split_is_told_in_a_sentence():
    assert splitter(StepsConfig()) is None
    split = splitter(StepsConfig(by="function", function="test_steps.shouted"))
    assert split is not None
    with pytest.raises(RolloutError, match="one behind the other, must be the answer's text"):
        split("a")
    broken = splitter(StepsConfig(by="function", function="builtins.sum"))
    assert broken is not None
    with pytest.raises(RolloutError, match=r"--steps\.function failed with TypeError"):
        broken("a")
    for config, message in (
        (StepsConfig(by="delimiter"), r"give --steps\.delimiter"),
        (StepsConfig(by="function"), r"give --steps\.function"),
        (StepsConfig(by="lines", delimiter="x"), r"--steps\.delimiter: it counts with --steps\.by delimiter alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(config)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("llama"))), device="cpu"))


def played(loaded: LoadedModel, answers: Sequence[str], **settings: Any) -> EpisodeBatch:
    """The steps of given answers, each ended, to one prompt."""
    prompts = encode_texts(["the red cat"] * len(answers), loaded.tokenizer, UNIFORM, 50)
    split = splitter(StepsConfig(**settings))
    assert split is not None
    player = StepPlayer(loaded, split, SegmentEncoder(loaded, UNIFORM, DocumentFrequency(1, {})))
    ids = [[*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in answers]
    wide = torch.tensor([[*row, *[loaded.pad_token_id] * (max(map(len, ids)) - len(row))] for row in ids])

    def sample(batch: PromptBatch) -> EpisodeBatch:
        return cut_responses(wide, batch, loaded, loaded.stop_ids)

    asked: list[EncodedPrompt] = prompts
    return player(sample, asked, prompt_batch(loaded, asked))


def test_steps_are_turns_of_the_sampled_tokens(loaded: LoadedModel):
    found = played(loaded, ["a dog . big house . tree", "bird"], by="delimiter", delimiter=".")
    width = found.prompts.ids.shape[1]
    names = [loaded.tokenizer.convert_ids_to_tokens(row.tolist()) for row in found.ids]
    assert list(zip(names[0], found.turn[0].tolist(), strict=True)) == [
        ("a", 0), ("dog", 0), (".", 0), ("big", 1), ("house", 1), (".", 1), ("tree", 2), ("<eos>", 2)
    ]  # fmt: skip
    assert found.turn[1].tolist() == [0] * 8
    # What was sampled is what was sampled: nothing is read, nothing is moved.
    assert torch.equal(found.sampled, found.real)
    assert found.completions == ("a dog . big house . tree", "bird")
    context = found.context
    assert context is not None
    assert [len(episode.segments) for episode in context.episodes] == [3, 1]
    assert [segment.text for segment in context.episodes[0].segments] == ["a dog .", " big house .", " tree"]
    since = {
        name: int(context.word_turn[0, word])
        for name, word in zip(names[0], context.words[0, width:].tolist(), strict=True)
        if word >= 0
    }
    assert since == {"a": 1, "dog": 1, "big": 2, "house": 2, "tree": 3}  # a step may look at those before it


def test_answers_of_one_step_are_as_they_were(loaded: LoadedModel):
    found = played(loaded, ["a dog", "bird"], by="lines")
    assert found.context is None
    assert not found.turn.any()


def test_a_run_judges_steps_and_its_metric_whole_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = {
        "--model": tiny.save_model(tmp_path / "start"), "--model.device": "cpu",
        "--data": tiny.save_prompts(tmp_path / "prompts.jsonl"), "--output_dir": tmp_path / "run", "--steps": 2,
        "--run.batch_size": 2, "--num_generations": 4, "--max_new_tokens": 12, "--evaluation.held_out": 2,
        "--steps.by": "delimiter", "--steps.delimiter": "the", "--salience.weighting": "uniform",
        "--reward.coverage.weight": 1, "--ppo.estimator": "rloo", "--ppo.turn_discount": 0.9, "--run.sample_rows": 8,
        "--evaluation.samples": 2,
    }  # fmt: skip
    assert main(["train", *(str(part) for pair in flags.items() for part in pair)]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    split = [row for row in samples if len(row.get("segments", ())) > 1]
    assert split
    for row in split:
        assert "".join(one["content"] for one in row["segments"]) == row["completion"]
        assert sum(row["by_turn"]) == pytest.approx(row["reward"], abs=1e-5)
        assert all(one["content"].endswith("the") for one in row["segments"][:-1])
    held_out = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in held_out].count(0) == 2  # an answer each, not one for each step
    assert main(["train", "--model", str(tmp_path / "start"), "--data", str(tmp_path / "prompts.jsonl"), "--output_dir",
                 str(tmp_path / "x"), "--steps.by", "lines", "--rollout.task", "a.b"]) == 2  # fmt: skip


def test_an_encoder_decoder_model_is_refused(tmp_path: Path):
    t5 = load_model(ModelConfig(str(tiny.save_model(tmp_path, "t5")), device="cpu"))
    split = splitter(StepsConfig(by="lines"))
    assert split is not None
    with pytest.raises(ConfigError, match="chains of thought need a decoder-only model"):
        StepPlayer(t5, split, SegmentEncoder(t5, UNIFORM, DocumentFrequency(1, {})))


def test_a_stop_string_is_no_step_and_no_text_is_lost(loaded: LoadedModel):
    """The text of the steps is the answer's; a token that two steps share says all of what the first one ends with."""
    prompts = encode_texts(["the red cat"], loaded.tokenizer, UNIFORM, 50)
    split = splitter(StepsConfig(by="delimiter", delimiter="."))
    assert split is not None
    player = StepPlayer(loaded, split, SegmentEncoder(loaded, UNIFORM, DocumentFrequency(1, {})))
    ids = torch.tensor([ids_of(loaded, "a dog . house")])

    def sample(batch: PromptBatch) -> EpisodeBatch:
        return cut_responses(ids, batch, loaded, loaded.stop_ids, ["house"])

    found = player(sample, prompts, prompt_batch(loaded, prompts))
    assert found.completions == ("a dog . ",)
    assert found.context is None  # one step: what stopped it is none
    assert [one.text for one in player.steps(ids[0].tolist(), "a dog . ")] == ["a dog . "]
    assert (
        "".join(one.text for one in player.steps(ids_of(loaded, "a dog . big . tree"), "a dog . big . tree"))
        == "a dog . big . tree"
    )


def test_the_right_result_is_compared_among_chains_of_any_length(loaded: LoadedModel):
    """Of two, three, four and one steps: right, wrong, right, wrong."""
    found = played(loaded, ["a . cat", "a . dog . tree", "a . dog . tree . cat", "tree"], by="delimiter", delimiter=".")
    columns = {"answer": "4"}
    texts = ("a . 4", "a . b . 5", "a . b . c . 4", "5")
    assert found.context is not None
    episodes = []
    for episode, text in zip(found.context.episodes, texts, strict=True):
        said = text.split(" . ")
        segments = tuple(replace(one, text=part) for one, part in zip(episode.segments, said, strict=True))
        episodes.append(replace(episode, segments=segments))
    prompts = tuple(replace(one, columns=columns) for one in found.prompts.prompts)
    one_group = replace(found.prompts, prompts=prompts, group=torch.zeros(4, dtype=torch.long))
    batch = replace(
        found, prompts=one_group, completions=texts, context=replace(found.context, episodes=tuple(episodes))
    )
    zeros = torch.zeros(batch.ids.shape)
    rewarded = RewardBatch(batch, Readings(zeros, zeros, zeros, zeros), None)
    reward = RewardFunction([ExactMatch(ExactMatchConfig(weight=1.0))], [1.0], "within_prompt")
    returns = reward(rewarded)
    assert returns.total.sign().tolist() == [1.0, -1.0, 1.0, -1.0]
    assert returns.total.sum() == pytest.approx(0.0, abs=1e-6)
    for row, episode in enumerate(episodes):  # paid at the last step
        assert returns.by_turn[row].nonzero().flatten().tolist() == [len(episode.segments) - 1]
