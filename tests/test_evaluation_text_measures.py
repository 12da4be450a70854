"""Measures of answers besides those of metrics.py: diversity, relevance by meaning, win rate, references, follow-up."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from cagsr.errors import ConfigError, DataError, ModelError
from cagsr.evaluation.intervals import win_rates
from cagsr.evaluation.judge_answers import embedding_relevance
from cagsr.evaluation.metrics import distinct_of_draws, self_bleu
from cagsr.evaluation.perplexity import follow_up_nll, load_judge
from cagsr.flow import Prompt
from cagsr.models.load import LoadedModel
from cagsr.models.sentence_encoder import load_encoder
from cagsr.prompts.references import column_texts, first_column, prompt_words


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["the red cat sees a dog", "The red cat sees a dog."]) == pytest.approx(1.0)
    # Two words, so orders 1 and 2: precisions 1/2 and, smoothed, 0.1/1; no brevity penalty.
    assert self_bleu(["a b", "a c"]) == pytest.approx(math.sqrt(0.5 * 0.1))
    # One shares nothing with the others: its share of the mean falls.
    assert self_bleu(["a b c d", "a b c d", "x y z w"]) < self_bleu(["a b c d"] * 3)
    assert math.isnan(self_bleu(["a b"]))
    assert math.isnan(self_bleu(["a b", "..."]))


def test_distinct_does_not_change_with_the_number_of_draws() -> None:
    one = distinct_of_draws(["a b", "a c"], 1, 1)
    assert one == pytest.approx(3 / 4)
    # Two draws for each of two prompts, prompt by prompt: (a b, a c) and (d e, d d).
    assert distinct_of_draws(["a b", "d e", "a c", "d d"], 2, 1) == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_win_rates_by_hand() -> None:
    mine = [np.array([2.0]), np.array([1.0, 3.0]), np.array([np.nan]), np.array([0.0, np.nan])]
    theirs = [np.array([1.0]), np.array([1.0, 2.0]), np.array([0.0]), np.array([1.0])]
    # Second prompt: 1-1 tie, 1-2 lost, 3-1 and 3-2 won.
    np.testing.assert_allclose(win_rates(mine, theirs), [1.0, 2.5 / 4, np.nan, 0.0])
    np.testing.assert_allclose(win_rates(mine, theirs) + win_rates(theirs, mine), [1, 1, np.nan, 1])


class Stub:
    """Embeds a text as its counts of a and b."""

    def __init__(self, path: str = "", **settings: Any) -> None:
        self.settings = settings

    def encode(self, sentences: list[str], *, batch_size: int, show_progress_bar: bool) -> np.ndarray:
        assert len(set(sentences)) == len(sentences)
        return np.array([[text.count("a"), text.count("b")] for text in sentences], dtype=np.float32)


def test_embedding_relevance_by_hand() -> None:
    found = embedding_relevance(Stub(), ["a", "a", "aab", "a", "a"], ["aa", "b", "abb", " ", "c"])
    np.testing.assert_allclose(found, [1.0, 0.0, 4 / 5, np.nan, np.nan])


def test_the_encoder_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r'sentence-transformers, .*: pip install "cagsr\[embeddings\]"\.$'):
        load_encoder(str(tmp_path), "cpu")
    with pytest.raises(ModelError, match=r"--embedding_model .*no such folder"):
        load_encoder(str(tmp_path / "none"), "cpu")
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    made: Any = load_encoder(str(tmp_path), "cpu")
    assert made.settings == {"device": "cpu", "model_kwargs": {"use_safetensors": True}}


def row(text: str = "tell me", **columns: Any) -> Prompt:
    return Prompt(row=7, text=text, columns=columns)


def test_references_in_every_form() -> None:
    chat = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
    rows = [
        row(ref="one"),
        row(ref=["one", "two"]),
        row(ref=chat),
        row(ref=[chat, "three"]),
        row(ref=None),
        row(ref=" "),
        row(
            ref=[{"role": "assistant", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}]
        ),
    ]
    assert column_texts(rows, "ref") == [["one"], ["one", "two"], ["yes"], ["yes", "three"], [], [], ["in parts"]]
    assert column_texts(rows[:1], None) == [[]]
    assert first_column(rows, ["other", "ref"]) == "ref"
    assert first_column(rows, ["other"]) is None
    with pytest.raises(DataError, match="row 7: column 'ref' holds int"):
        column_texts([row(ref=3)], "ref")


def test_chat_templates_are_no_words_of_the_prompt() -> None:
    messages = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"})
    assert prompt_words(Prompt(1, "<|system|>be kind<|user|>hello<|assistant|>", messages=messages)) == "be kind\nhello"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_judge(str(tiny.save_model(tmp_path_factory.mktemp("judge"))), "cpu")


def by_hand(judge: LoadedModel, context: str, text: str, special: bool = True) -> float:
    before = judge.tokenizer(context, add_special_tokens=special)["input_ids"]
    after = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = judge.model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return float(-np.mean([logp[len(before) + i - 1, token] for i, token in enumerate(after)]))


def test_follow_up_by_hand_and_without_regard_to_the_batch(judge: LoadedModel) -> None:
    prompts = [row(), row("tell me about the cat"), row("the dog"), row()]
    answers = ["the red cat .", "a bird near a house", "", "x"]
    found = follow_up_nll(judge, prompts, answers, ["the cat sees a dog", " a tree ", "the bird", None])
    assert found[0] == pytest.approx(by_hand(judge, "tell me the red cat .", "the cat sees a dog"), rel=1e-4)
    assert found[1] == pytest.approx(by_hand(judge, "tell me about the cat a bird near a house", "a tree"), rel=1e-4)
    assert found[2] == pytest.approx(by_hand(judge, "the dog", "the bird"), rel=1e-4)
    assert np.isnan(found[3])


def test_the_follow_up_depends_on_the_answer(judge: LoadedModel) -> None:
    found = follow_up_nll(judge, [row(), row()], ["the red cat", "a blue bird"], ["the dog", "the dog"])
    assert abs(found[0] - found[1]) > 1e-3


def test_a_chat_goes_through_the_judges_template_and_only_the_content_counts(
    judge: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.role }} , {{ m.content }} . {% endfor %}"
    monkeypatch.setattr(judge.tokenizer, "chat_template", template)
    chat = Prompt(1, "whatever", messages=({"role": "user", "content": "the cat"},))
    found = follow_up_nll(judge, [chat], ["a dog"], ["the bird"])
    context = "user , the cat . assistant , a dog . user , "
    assert found[0] == pytest.approx(by_hand(judge, context, "the bird", special=False), rel=1e-4)
    monkeypatch.setattr(judge.tokenizer, "chat_template", None)
    found = follow_up_nll(judge, [chat], ["a dog"], ["the bird"])
    assert found[0] == pytest.approx(by_hand(judge, "the cat a dog", "the bird"), rel=1e-4)


def test_judges_that_will_not_do(judge: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--judge_model .*no such folder"):
        load_judge(str(tmp_path / "none"), "cpu")
    with pytest.raises(ModelError, match="decoder-only"):
        load_judge(str(tiny.save_model(tmp_path, "t5")), "cpu")
    with pytest.raises(ModelError, match=r"--judge_model .*101 tokens, the judge reads 64"):
        follow_up_nll(judge, [row()], ["cat " * 96], ["a dog"])
