"""Faithfulness of the attention: which words are hidden, and that hiding is what transformers makes of a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cagsr.config import AttentionConfig, ModelConfig, SalienceConfig
from cagsr.flow import EpisodeBatch, RewardBatch
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.settings import RewardConfig
from cagsr.reward.terms.faithfulness import Faithfulness, FaithfulnessConfig, most_and_least, tokens_of
from cagsr.reward.turns import Exchanges
from cagsr.scoring.answers import answered, encode_response
from cagsr.scoring.hidden_words import HiddenWords
from test_reward_turns import by_hand

UNIFORM = SalienceConfig(weighting="uniform")


def test_the_words_that_are_hidden_by_hand():
    #                     tokens:      first        second: the largest counts, the masked one does not
    attention = torch.tensor([[[0.1, 0.5, 0.2, 0.0, 0.9], [0.3, 0.1, 0.2, 0.05, 0.0], [1.0] * 5]])
    salience = torch.tensor([[1.0, 2.0, 0.5, 1.0, 0.0]])  # the last is no word
    mask = torch.tensor([[True, True, False]])
    most, least = most_and_least(attention, salience, mask, 0.5)
    assert most.tolist() == [[True, True, False, False, False]]
    assert least.tolist() == [[False, False, True, True, False]]
    most, least = most_and_least(attention, salience, mask, 0.1)  # one at least
    assert most.tolist() == [[False, True, False, False, False]]
    assert least.tolist() == [[False, False, False, True, False]]
    most, least = most_and_least(attention, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]), mask, 1.0)
    assert not most.any()  # with a single word there is nothing to compare
    assert not least.any()


@given(st.integers(0, 9), st.floats(0.05, 1.0), st.booleans())
def test_as_many_of_both_and_none_in_common(words: int, share: float, equal: bool):
    attention = (
        torch.zeros(1, 2, words) if equal else torch.rand(1, 2, words, generator=torch.Generator().manual_seed(words))
    )
    most, least = most_and_least(attention, torch.ones(1, words), torch.ones(1, 2).bool(), share)
    assert int(most.sum()) == int(least.sum()) == min(max(1, int(words * share + 1e-9)), words // 2)
    assert not (most & least).any()


def test_the_tokens_of_words():
    words = torch.tensor([[True, False, True]])
    assert tokens_of(words, torch.tensor([[-1, 0, 1, 2, 2]])).tolist() == [[False, True, False, True, True]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("llama"))), device="cpu"))


def answers(loaded: LoadedModel) -> EpisodeBatch:
    texts = ["the red cat near a big house", "a dog and the bird", "cat dog"]
    prompts = encode_texts(texts, loaded.tokenizer, UNIFORM, 60)
    said = [
        encode_response(loaded, one, text)
        for one, text in zip(prompts, ["the cat", "a big bird and", "tree"], strict=True)
    ]
    return answered(loaded, prompts, said)


def test_hidden_tokens_are_as_if_nobody_had_said_them(loaded: LoadedModel):
    """Not even the last one, whose place is where the answer's first token is predicted."""
    episodes = answers(loaded)
    hidden = episodes.prompts.words == 1
    found = HiddenWords(loaded)(episodes, hidden)
    assert found.shape == episodes.ids.shape
    for row in range(3):
        real, gone = episodes.prompts.real[row], hidden[row]
        prompt, own = episodes.prompts.ids[row][real], episodes.ids[row][episodes.sampled[row]]
        kept = prompt[~gone[real]]
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.cat([kept, own])[None]).logits
        expected = logits.log_softmax(-1)[0, len(kept) - 1 : -1].gather(1, own[:, None])[:, 0]
        torch.testing.assert_close(found[row, : len(own)], expected, atol=1e-4, rtol=1e-4)
        assert (found[row, len(own) :] == 0).all()
    # Hiding nothing is the plain pass, and hiding something is not.
    plain = HiddenWords(loaded)(episodes, torch.zeros_like(hidden))
    readings = AnswerScorer(loaded, RewardConfig(), AttentionConfig(), UNIFORM).batch(episodes).readings
    torch.testing.assert_close(plain, torch.where(episodes.sampled, readings.logprobs, 0.0), atol=1e-5, rtol=1e-5)
    assert (plain - found).abs().max() > 1e-3


def test_the_model_is_left_as_it_was(loaded: LoadedModel):
    loaded.model.train()
    episodes = answers(loaded)
    HiddenWords(loaded)(episodes, torch.zeros_like(episodes.prompts.real))
    assert loaded.model.training
    assert all(one.grad is None for one in loaded.model.parameters())
    loaded.model.eval()


class Costs:
    """A likelihood that falls by what the hidden words are worth: word k costs 10^k nats on the first token."""

    def __call__(self, episodes: EpisodeBatch, hidden: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(episodes.ids.shape)
        for row, words in enumerate(episodes.prompts.words):
            gone = {int(word) for word in words[hidden[row]]}
            found[row, 0] = -sum(10.0**word for word in gone)
        return found


def test_the_value_is_what_the_hardest_cost_more_than_the_least(make_reward_batch: Callable[..., RewardBatch]):
    batch = make_reward_batch(prompts=1, generations=2)
    assert batch.attention is not None
    words = batch.episodes.salience.shape[1]
    prompts = batch.episodes.prompts
    everywhere = torch.arange(prompts.ids.shape[1]).remainder(words).expand_as(prompts.words)
    prompts = replace(prompts, words=everywhere, salience=torch.ones_like(prompts.salience))
    batch = replace(batch, episodes=replace(batch.episodes, prompts=prompts))
    looked = torch.zeros_like(batch.attention.words)
    looked[0, 0, 0], looked[1, 0, words - 1] = 1.0, 1.0
    looked[:, 0] += torch.linspace(0.1, 0.0, words)
    batch = replace(batch, attention=replace(batch.attention, words=looked))  # type: ignore[type-var]
    term = Faithfulness(FaithfulnessConfig(weight=1.0, share=0.01), Costs())  # type: ignore[arg-type]
    found = term(batch)
    assert found.applies.all()
    lengths = batch.episodes.lengths.tolist()
    # The first answer looked at word 0 hardest, at the last one least; the second the other way round.
    first, second = 1.0 - 10.0 ** (words - 1), 10.0 ** (words - 1) - 10.0 ** (words - 2)
    assert found.values.tolist() == pytest.approx([first / lengths[0], second / lengths[1]])


def test_answers_in_later_turns_are_left_out():
    answers = Exchanges.of(by_hand()).batch
    found = Faithfulness(FaithfulnessConfig(), Costs())(answers)  # type: ignore[arg-type]
    assert not found.applies.any()


def test_it_is_measured_where_it_is_asked_for_alone(loaded: LoadedModel, tmp_path: Path):
    plain = AnswerScorer(loaded, RewardConfig(), AttentionConfig(), UNIFORM)
    assert "faithfulness" not in {term.name for term in plain.terms}
    costly = AnswerScorer(loaded, RewardConfig(), AttentionConfig(), UNIFORM, costly=True)
    values = costly.values(costly.batch(answers(loaded)))["faithfulness"]
    assert values.isfinite().all()
    weighted = replace(RewardConfig(), faithfulness=FaithfulnessConfig(weight=1.0))
    assert "faithfulness" in AnswerScorer(loaded, weighted, AttentionConfig(), UNIFORM).weights
