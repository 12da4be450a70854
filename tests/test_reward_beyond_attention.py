"""Terms that read no attention: lexical support, context gain, agreement, certainty by other measures, target probability."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from cagsr.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    RewardConfig,
    SalienceConfig,
    StepsConfig,
    TrainConfig,
    validate,
)
from cagsr.errors import ConfigError
from cagsr.flow import EpisodeBatch, RewardBatch
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stating_words import StatingWords
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.build import build_reward
from cagsr.reward.metrics import best_of_gain, reward_metrics
from cagsr.reward.registry import Resources
from cagsr.reward.terms.agreement import Agreement, AgreementConfig, agreement, same_meanings, same_results
from cagsr.reward.terms.context_gain import ContextGain, ContextGainConfig, context_gain, prompt_tokens
from cagsr.reward.terms.lexical_support import LexicalSupport, LexicalSupportConfig
from cagsr.reward.terms.self_certainty import SelfCertainty, SelfCertaintyConfig, last_tokens
from cagsr.reward.terms.target_probability import TargetProbability, TargetProbabilityConfig, target_probability
from cagsr.scoring.answers import answered, encode_response
from cagsr.scoring.hidden_words import HiddenWords
from cagsr.scoring.stating_tokens import StatingTokensOf
from cagsr.scoring.target_likelihood import TargetLikelihoodOf
from cagsr.tasks.final_answer import final_answer, final_answer_span, result_of

UNIFORM = SalienceConfig(weighting="uniform")
# "the" is in all prompts and states nothing.
FREQUENCY = DocumentFrequency(100, {"the": 100, "cat": 2, "dog": 1, "red": 1, "house": 1})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("llama"))), device="cpu"))


def answers(
    loaded: LoadedModel, prompts: list[str], said: list[str], group: list[int] | None = None, **columns: Any
) -> EpisodeBatch:
    encoded = encode_texts(prompts, loaded.tokenizer, UNIFORM, 60)
    encoded = [replace(one, prompt=replace(one.prompt, columns=columns)) for one in encoded]
    found = answered(
        loaded, encoded, [encode_response(loaded, one, text) for one, text in zip(encoded, said, strict=True)]
    )
    if group is None:
        return found
    return replace(found, prompts=replace(found.prompts, group=torch.tensor(group)))


def batch_of(loaded: LoadedModel, episodes: EpisodeBatch) -> RewardBatch:
    return AnswerScorer(loaded, RewardConfig(), AttentionConfig(), UNIFORM).batch(episodes)


# ---- what states something ----


def test_support_by_hand():
    stating = StatingWords(FREQUENCY)
    assert stating.words == {"cat", "dog", "red", "house"}
    assert stating.support("the red cat", "The cat, a Red cat, is near the house") == (2 / 3, 3)
    assert stating.support("the red cat", "it is the one") == (1.0, 0)
    # What a template says is nobody's.
    assert stating.support("red cat", "a red cat", [(0, 3)]) == (0.5, 2)


def test_the_tokens_of_stating_words(loaded: LoadedModel):
    episodes = answers(loaded, ["the cat", "the cat"], ["the red cat sees the dog", "tree"])
    found = StatingTokensOf(loaded, StatingWords(FREQUENCY))(episodes)
    names = loaded.tokenizer.convert_ids_to_tokens(episodes.ids[0].tolist())
    assert {name: int(number) for name, number in zip(names, found[0], strict=True)} == {
        **{"the": -1, "red": 0, "cat": 1, "sees": -1, "dog": 2},
        "<eos>": -1,
    }
    assert (found[1] == -1).all()


def test_lexical_support_does_not_apply_to_answers_that_state_nothing(loaded: LoadedModel):
    episodes = answers(loaded, ["the red cat", "the red cat"], ["the red dog", "near the tree"])
    found = LexicalSupport(LexicalSupportConfig(), FREQUENCY)(RewardBatch(episodes, None, None))  # type: ignore[arg-type]
    assert found.values.tolist()[0] == 0.5
    assert found.applies.tolist() == [True, False]


# ---- context gain ----


def test_context_gain_by_hand():
    given_it = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, 0.0]])
    without = torch.tensor([[-3.0, -2.5, -0.5], [-0.5, -4.0, 0.0]])
    counted = torch.tensor([[True, True, True], [True, False, False]])
    assert context_gain(given_it, without, counted, "sum").tolist() == [[2.0, 0.5, 0.0], [-0.5, 0.0, 0.0]]
    assert context_gain(given_it, without, counted, "mean").sum(dim=1).tolist() == pytest.approx([2.5 / 3, -0.5])
    assert context_gain(given_it, without, torch.zeros(2, 3).bool(), "mean").tolist() == [[0.0] * 3] * 2


def test_what_is_hidden_lies_between_the_salient_words():
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]).bool()
    words = torch.tensor([[-1, -1, 0, -1, 1, -1, -1]])
    assert prompt_tokens(real, words).tolist() == [[False, False, True, True, True, False, False]]
    # The first token is where attention rests; it stays, whatever it says.
    words = torch.tensor([[-1, 0, -1, 1, -1, -1, -1]])
    assert prompt_tokens(real, words).tolist() == [[False, False, True, True, False, False, False]]
    assert not prompt_tokens(real, torch.full_like(words, -1)).any()


def test_context_gain_of_a_model(loaded: LoadedModel):
    """Against two plain passes, one of the prompt's first token and the answer alone; dense gains sum to the value."""
    prompts = ["the red cat", "the red cat", "the dog near a big house"]
    episodes = answers(loaded, prompts, ["cat red", "the dog", "house near dog"], [0, 0, 1])
    batch = batch_of(loaded, episodes)
    resources = {
        "hidden_likelihood": HiddenWords(loaded),
        "stating_tokens": StatingTokensOf(loaded, StatingWords(FREQUENCY)),
    }

    def gains(**settings: Any) -> Tensor:
        found = ContextGain(ContextGainConfig(**settings), **resources)(batch)
        assert found.applies.all()
        return found.values

    def logprobs(ids: list[int], answer: list[int]) -> Tensor:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0].log_softmax(dim=-1)
        return logits[len(ids) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]

    for row in range(3):
        prompt = episodes.prompts.ids[row][episodes.prompts.real[row]].tolist()
        own = episodes.ids[row][episodes.sampled[row]].tolist()
        expected = logprobs(prompt, own) - logprobs(prompt[:1], own)
        torch.testing.assert_close(gains()[row], expected.sum(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gains(reduce="mean")[row], expected.mean(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gains(dense=True)[row, : len(own)], expected, atol=1e-4, rtol=1e-4)
        names = loaded.tokenizer.convert_ids_to_tokens(own)
        states = torch.tensor([name in ("red", "cat", "dog", "house") for name in names])
        torch.testing.assert_close(gains(over="stating")[row], expected[states].sum(), atol=1e-4, rtol=1e-4)


def test_a_prompt_hidden_alike_is_read_once_for_its_answers(loaded: LoadedModel):
    episodes = answers(loaded, ["the red cat near a house"] * 4, ["cat red", "the dog", "house near dog", "a"], [0] * 4)
    hidden = prompt_tokens(episodes.prompts.real, episodes.words)
    read: list[int] = []
    handle = loaded.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: read.append(ids[0].numel()))
    try:
        apart = HiddenWords(loaded)(episodes, hidden)
        tokens = sum(read)
        read.clear()
        shared = HiddenWords(loaded)(episodes, hidden, same=True)
    finally:
        handle.remove()
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-4)
    assert sum(read) < tokens


# ---- agreement ----


def test_agreement_by_hand():
    assert agreement([0, 0, 1, None], "majority").tolist() == [1.0, 1.0, 0.0, 0.0]
    assert agreement([0, 0, 1, 1], "majority").tolist() == [1.0] * 4
    assert agreement([0, 1, 2, None], "majority").tolist() == [0.0] * 4  # nobody agrees with anybody
    torch.testing.assert_close(agreement([0, 0, 0, 1, None], "share"), torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0]))


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_agreement_asks_for_no_order(clusters: list[int | None], random: Any):
    order = list(range(len(clusters)))
    random.shuffle(order)
    for pays in ("majority", "share"):
        found = agreement(clusters, pays)
        assert agreement([clusters[place] for place in order], pays).tolist() == found[order].tolist()
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_equal_results_are_equal_numbers():
    assert same_results(["1,000", "$1000.00", None, "x", " X."]) == [0, 0, None, 1, 1]


def test_meanings_by_hand():
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 0.0]])
    found = same_meanings(vectors, 0.75)
    assert found[0] == found[1]  # of whatever length
    assert found[2] == found[3]  # a cosine of 0.8
    assert len({found[0], found[2], found[4]}) == 3
    assert len(set(same_meanings(vectors[:2], 1.0))) == 1


def test_agreement_of_answers(loaded: LoadedModel):
    texts = ["so it is 4", "that makes 4", "I get 5", "no idea", "it is 4", "it is 7"]
    episodes = answers(loaded, ["the red cat"] * 6, ["cat"] * 6, [0, 0, 0, 0, 1, 2])
    batch = RewardBatch(replace(episodes, completions=tuple(texts)), None, None)  # type: ignore[arg-type]
    found = Agreement(AgreementConfig())(batch)
    assert found.values.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert found.applies.tolist() == [True, True, True, True, False, False]
    meaning = Agreement(AgreementConfig(by="meaning", pays="share"))
    said = ("red cat", "cat red", "dog house", "a dog house", "x", "y")
    found = meaning(RewardBatch(replace(episodes, completions=said), None, None))  # type: ignore[arg-type]
    assert found.values.tolist()[:2] == pytest.approx([1 / 3] * 2)


# ---- certainty ----


def test_certainty_by_hand(loaded: LoadedModel):
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert last_tokens(mask, 1 / 3).tolist() == [[False, False, True, False], [True, False, False, False]]
    assert last_tokens(mask, 0.5).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert torch.equal(last_tokens(mask, 1.0), mask)
    batch = batch_of(loaded, answers(loaded, ["the red cat"], ["a big dog"]))
    readings, length = batch.readings, int(batch.episodes.sampled.sum())

    def value(**settings: Any) -> float:
        return float(SelfCertainty(SelfCertaintyConfig(**settings))(batch)[0])

    assert value() == pytest.approx(float(readings.certainty.sum()) / length, rel=1e-5)
    assert value(kind="entropy") == pytest.approx(-float(readings.entropy.sum()) / length, rel=1e-5)
    chances = readings.logprobs[0, :length].exp()
    assert value(kind="mean_probability") == pytest.approx(float(chances.mean()), rel=1e-5)
    assert value(kind="mean_probability", last=0.5) == pytest.approx(float(chances[-2:].mean()), rel=1e-5)


# ---- the reference's probability ----


def test_where_an_answer_ends():
    for text in (
        "so 3 + 4 = 7. #### 7",
        "<answer> a cat </answer>!",
        "I think the answer is 12.",
        "17 and 18",
        r"\boxed{x}",
    ):
        span = final_answer_span(text)
        assert span is not None
        assert text[slice(*span)] == final_answer(text)
    assert final_answer_span("none here") is None
    assert result_of("3 + 4 = 7\n#### 7") == "7"
    assert result_of(" the cat ") == "the cat"
    assert result_of(7) == "7"


def test_target_probability_by_hand():
    logprobs = torch.tensor([[math.log(0.5), math.log(0.1)], [math.log(0.2), 0.0]])
    real = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(target_probability(logprobs, real, "mean"), torch.tensor([0.3, 0.2]))
    torch.testing.assert_close(target_probability(logprobs, real, "product"), torch.tensor([0.05, 0.2]))


def test_target_probability_of_a_model(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    said = ["a cat sees <answer>the dog</answer> near", "the tree", "a big house <answer>a cat</answer>"]
    ids = {one: loaded.tokenizer.convert_tokens_to_ids(one) for one in ("a", "cat", "sees", "the", "red", "bird")}
    episodes = answers(
        loaded, ["the red cat"] * 3, ["a cat sees the dog near", "the tree", "a big house a cat"], answer="red bird"
    )
    # The tags are no words of this vocabulary: the texts say them, and the tokens of "a cat sees" are what stands before.
    episodes = replace(episodes, completions=("a cat sees #### the dog", said[1], "a big house"))
    likelihood = TargetLikelihoodOf(loaded)
    logprobs, real = likelihood(episodes, torch.tensor([0, 2]), [len("a cat sees "), 0], ["red bird", "cat"])
    assert real.tolist() == [[True, True], [True, False]]
    prompt = episodes.prompts.ids[0][episodes.prompts.real[0]].tolist()
    for row, (before, target) in enumerate([(["a", "cat", "sees"], ["red", "bird"]), ([], ["cat"])]):
        own = [*prompt, *(ids[one] for one in before)]
        wanted = [ids[one] for one in target]
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([[*own, *wanted]])).logits[0].log_softmax(dim=-1)
        expected = logits[len(own) - 1 : -1].gather(1, torch.tensor(wanted)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, : len(wanted)], expected, atol=1e-4, rtol=1e-4)


def test_a_target_without_room_is_no_failure(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, "gpt2")), device="cpu"))
    episodes = answers(loaded, ["the red cat"] * 2, ["a cat"] * 2, answer="x")
    _, real = TargetLikelihoodOf(loaded)(episodes, torch.tensor([0, 1]), [0, 0], ["cat " * 70, "dog"])
    assert real.any(dim=1).tolist() == [False, True]


def test_target_probability_applies_where_there_is_a_reference(loaded: LoadedModel):
    episodes = answers(loaded, ["the red cat"] * 3, ["a cat"] * 3, answer="5")
    prompts = list(episodes.prompts.prompts)
    prompts[2] = replace(prompts[2], columns={})
    texts = ("2 and 3 make 5", "nothing", "it is 4")
    episodes = replace(episodes, completions=texts, prompts=replace(episodes.prompts, prompts=tuple(prompts)))
    asked: list[Any] = []

    def likelihood(_: EpisodeBatch, rows: Tensor, starts: Any, targets: Any) -> tuple[Tensor, Tensor]:
        asked.append((rows.tolist(), starts, targets))
        return torch.log(torch.tensor([[0.25]])), torch.ones(1, 1).bool()

    found = TargetProbability(TargetProbabilityConfig(), likelihood)(RewardBatch(episodes, None, None))  # type: ignore[arg-type]
    assert asked == [([0], [len("2 and 3 make ")], ["5"])]
    assert found.values.tolist() == [0.25, 0.0, 0.0]
    assert found.applies.tolist() == [True, True, False]
    missing = TargetProbability.missing(TargetProbabilityConfig(), [prompts[2]])
    assert missing is not None
    assert "target_probability.column" in missing


# ---- watched terms ----


def test_a_watched_term_is_computed_and_not_paid(loaded: LoadedModel):
    episodes = answers(loaded, ["the red cat"] * 2, ["a red dog", "the cat cat cat cat cat"], [0, 0])
    plain = RewardConfig(grounded_coverage=replace(RewardConfig().grounded_coverage, weight=0.0))
    watching = replace(plain, watched=["lexical_support", "length"])
    resources = Resources(frequency=FREQUENCY)
    batch = RewardBatch(episodes, None, None)  # type: ignore[arg-type]
    found = [
        build_reward(config, device="cpu", resources=resources)
        for config in (
            replace(plain, length=replace(plain.length, weight=-0.5)),
            replace(watching, length=replace(plain.length, weight=-0.5)),
        )
    ]
    without, having = (reward(batch) for reward in found)
    assert torch.equal(without.total, having.total)
    assert having.terms["lexical_support"].tolist() == [0.5, 1.0]
    assert "lexical_support" not in without.terms
    assert "lexical_support" not in having.contributions
    assert found[0].state_dict() == found[1].state_dict()  # its scale is nobody's business
    with pytest.raises(ConfigError, match="watched 'nothing' is no registered term"):
        build_reward(replace(plain, watched=["nothing"]), device="cpu", resources=resources)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"coverage": {"new": True}}, "--reward.coverage.turns first"),
        ({"grounded_coverage": {"new": True, "turns": "latest"}}, "--reward.grounded_coverage.turns first"),
        ({"agreement": {"embedding_model": "x"}}, "--reward.agreement.by meaning"),
        ({"probe": {"path": "x", "layer": 1}}, "leave one of the two out"),
    ],
)
def test_what_does_not_go_together(changed: dict[str, dict[str, Any]], said: str):
    config = RewardConfig()
    given = {name: replace(getattr(config, name), **values) for name, values in changed.items()}
    with pytest.raises(ConfigError, match=said):
        build_reward(replace(config, **given), device="cpu")


@pytest.mark.parametrize("name", ["context_gain", "target_probability", "faithfulness"])
def test_terms_of_single_answers_are_refused_where_there_are_several(name: str):
    config = RewardConfig()
    reward = replace(config, **{name: replace(getattr(config, name), weight=1.0)})
    steps = replace(StepsConfig(), by="lines")
    asked = TrainConfig(ModelConfig("m"), DataConfig("d"), "run", reward=reward, steps=steps)
    with pytest.raises(ConfigError, match=rf"--reward\.{name} judges single answers, and --steps\.by"):
        validate(asked)


def test_terms_that_count_words_are_refused_where_nothing_was_counted(loaded: LoadedModel):
    asks = RewardConfig(watched=["lexical_support"])
    with pytest.raises(ConfigError, match="lexical_support: it counts words"):
        AnswerScorer(loaded, asks, AttentionConfig(), UNIFORM)
    assert "lexical_support" in AnswerScorer(loaded, asks, AttentionConfig(), UNIFORM, frequency=FREQUENCY).weights


def test_the_best_of_n_by_hand():
    group = torch.tensor([0, 0, 0, 0, 1])
    signal = torch.tensor([3.0, 0.0, 2.0, 1.0, 9.0])
    deviation = math.sqrt(5 / 3)
    # Of two the better one is at place 0, 1, 2, 3 in 0, 1, 2, 3 of 6 cases; centred values are -1.5, -0.5, 0.5, 1.5.
    assert best_of_gain(signal, signal, group, 2) == pytest.approx((-0.5 + 2 * 0.5 + 3 * 1.5) / 6 / deviation)
    assert best_of_gain(signal, signal, group, 4) == pytest.approx(1.5 / deviation)
    assert best_of_gain(signal, -signal, group, 4) == pytest.approx(-1.5 / deviation)
    assert best_of_gain(signal, signal, group, 5) == 0.0
    assert best_of_gain(torch.full((5,), torch.nan), signal, group, 2) == 0.0
    # A reward that tells nothing apart gains nothing, in whatever order the answers stand.
    assert best_of_gain(signal, torch.ones(5), group, 2) == pytest.approx(0.0)
    tied = torch.tensor([1.0, 0.0, 1.0, 0.0, 5.0])  # of 3 and 2 the one as often as the other
    assert best_of_gain(signal, tied, group, 4) == pytest.approx((3 + 2) / 2 / deviation - 1.5 / deviation)


def test_what_is_watched_is_held_against_the_reward(loaded: LoadedModel):
    said = ["a red dog", "the red cat cat cat cat", "house"]
    episodes = answers(loaded, ["the red cat"] * 3, said, [0, 0, 0])
    config = RewardConfig(
        grounded_coverage=replace(RewardConfig().grounded_coverage, weight=0.0),
        length=replace(RewardConfig().length, weight=1.0),
        echo=replace(RewardConfig().echo, weight=0.0),
        repetition=replace(RewardConfig().repetition, weight=0.0),
        watched=["lexical_support"],
    )
    reward = build_reward(config, device="cpu", resources=Resources(frequency=FREQUENCY))
    returns = reward(RewardBatch(episodes, None, None))  # type: ignore[arg-type]
    lengths = episodes.sampled.sum(dim=1)
    metrics = reward_metrics(returns, lengths.float(), episodes.prompts.group)
    support, total = torch.tensor([0.5, 1.0, 0.0]), returns.total
    expected = np.corrcoef(support, total)[0, 1]
    assert metrics["rewards/lexical_support/agreement"] == pytest.approx(expected, abs=1e-6)
    assert metrics["rewards/lexical_support/gain_all"] == pytest.approx(0.5 / 0.5)  # the longest is the best supported
    assert "rewards/lexical_support/share" not in metrics
    assert "rewards/length/agreement" not in metrics
