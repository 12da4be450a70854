"""Whether made-up numbers and names of summaries are found: the words that are judged, their signals, and the interval by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.e2e import probe_variants
from examples.e2e.prepare import write_jsonl
from examples.scitldr import grounding
from examples.scitldr.measures import Stated, stated

import tiny
from cagsr.config import ModelConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.reward.learn_probe import Examples
from cagsr.scoring.answers import Response, encode_response


def test_numbers_and_names_and_what_holds_them():
    found = list(stated("We train BERT on 3 sets.", "Bert and GPT on 3 of 14 sets"))
    assert found == [Stated(9, 12, False, False), Stated(16, 17, True, True), Stated(21, 23, True, False)]


def test_auroc_by_hand():
    """Abstracts are drawn whole: with the words of one all true, it never changes how those of the other are told apart."""
    values = np.array([0.9, 0.1, 0.5, 0.5])
    absent = np.array([True, False, True, False])
    found = grounding.auroc_interval(values, absent, np.array([7, 7, 7, 7]))
    assert (found.mean, found.low, found.high) == pytest.approx((0.875, 0.875, 0.875))
    split = grounding.auroc_interval(values, absent, np.array([0, 0, 1, 1]))
    assert split.mean == pytest.approx(0.875)
    assert (split.low, split.high) == pytest.approx((0.5, 1.0))  # the second alone, the first alone


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> grounding.Options:
    monkeypatch.setattr(tiny, "WORDS", [*tiny.WORDS, "BERT", "GAN", "3", "7"])
    tiny.save_model(tmp_path / "model", scale=1.0)
    texts = ["the BERT sees 3 cat", "the GAN sees 7 dog", "a BERT likes 7 bird", "a GAN likes 3 tree"]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": text} for text in texts[:2]])
    names = ("model", "prompts.jsonl", "test.jsonl", "found.json", "found.md")
    return grounding.Options(*(tmp_path / name for name in names), test_prompts=2, candidates=1, max_new_tokens=16)


def given(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """Every abstract has this summary, and the probe is fitted on noise."""

    def answers(
        loaded: LoadedModel, prompts: list[EncodedPrompt], *_: Any
    ) -> tuple[list[EncodedPrompt], list[Response]]:
        return prompts, [encode_response(loaded, one, said) for one in prompts]

    def examples(loaded: LoadedModel, *_: Any) -> Examples:
        draw = np.random.default_rng(0)
        width = loaded.model.config.hidden_size
        hidden = {layer: torch.from_numpy(draw.normal(size=(200, width))).float() for layer in (0, 1)}
        return Examples(hidden, draw.random(200) < 0.5, draw.integers(0, 40, 200))

    monkeypatch.setattr(probe_variants, "answers_to", answers)
    monkeypatch.setattr(probe_variants, "examples_of", examples)


def test_words_are_judged_with_every_signal(options: grounding.Options, monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, " a BERT and 7 near the cat")
    grounding.main(options)
    assert options.output is not None
    assert options.markdown is not None
    found = json.loads(options.output.read_text())
    # One abstract holds BERT and no 7, the other 7 and no BERT.
    judged = sorted((one["abstract"], one["word"], one["absent"]) for one in found["words"])
    assert sorted(one[1:] for one in judged) == [("7", False), ("7", True), ("BERT", False), ("BERT", True)]
    assert {absent for abstract, word, absent in judged if word == "BERT"} == {True, False}
    assert len(found["auroc"]) == 7
    assert all(0 <= one["low"] <= one["mean"] <= one["high"] <= 1 for one in found["auroc"].values())
    table = options.markdown.read_text()
    assert table.startswith(
        "4 numbers and names (2 and 2) in summaries of 2 abstracts; 2 are not in the abstract (1 and 1)."
    )
    assert table.count("\n| ") == 9


def test_surprise_is_the_words_own(options: grounding.Options, monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, " a BERT and 7 near the cat")
    judged, _ = grounding.judge(options)
    loaded = load_model(ModelConfig(str(options.model)), for_training=False)
    first = judged.texts.index(("BERT", judged.texts[0][1]))
    text = next(
        text
        for text in ("the BERT sees 3 cat", "the GAN sees 7 dog")
        if ("BERT" in text) is not bool(judged.absent[first])
    )
    ids = torch.tensor([loaded.tokenizer(f"{text} a BERT").input_ids])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits[0, -2].double()
    expected = -float(logits.log_softmax(dim=0)[ids[0, -1]])
    assert judged.signals["surprise (- log-probability of the word)"][first] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("said", [" a cat and the dog BERT GAN 3 7 GAN 9 and a", " a cat and the dog"])
def test_nothing_made_up_is_one_sentence(said: str, options: grounding.Options, monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, said)
    monkeypatch.setattr(grounding, "stated", lambda prompt, text: (one for one in stated(f"BERT GAN 3 7 {text}", text)))
    with pytest.raises(DataError, match="are made up: nothing to tell apart"):
        grounding.main(options)
    assert options.output is not None
    assert not options.output.exists()
