"""Metrics of answers: numbers by hand, masks, and intervals that behave as intervals should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cagsr.errors import ModelError
from cagsr.evaluation import intervals, metrics
from cagsr.evaluation.perplexity import perplexity


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the cat": precision 2/3, recall 2/4, F = 2 * (2/3 * 1/2) / (2/3 + 1/2) = 4/7.
    assert metrics.rouge_l("the cat sat", ["the black cat ran"]) == pytest.approx(4 / 7)


def test_rouge_l_takes_the_best_reference_whatever_their_order() -> None:
    references = ["something else entirely", "the cat sat"]
    assert metrics.rouge_l("The cat sat.", references) == 1.0
    assert metrics.rouge_l("The cat sat.", references[::-1]) == 1.0
    with pytest.raises(ValueError, match="reference"):
        metrics.rouge_l("x", [])
    # the cat | cat sat against the black | black cat | cat ran, and against itself
    assert metrics.rouge("the cat sat", ["the black cat ran", "the cat sat"], "rouge2") == [0.0, 1.0]
    assert metrics.rouge("cat the", ["the black cat ran"], "rouge1") == pytest.approx([2 * 2 / 6])
    assert metrics.rouge("cat the", ["the black cat ran"], "rougeL") == pytest.approx([2 * 1 / 6])


def test_repetition_by_hand() -> None:
    # trigrams: abc bca cab abc -> 3 distinct of 4
    assert metrics.repetition("a b c a b c") == pytest.approx(0.25)
    assert metrics.repetition("A b, c. a B c!") == pytest.approx(0.25)  # case and punctuation don't hide it
    assert metrics.repetition("a b") == 0.0
    assert metrics.repetition("a a a a", n=1) == pytest.approx(0.75)


def test_distinct_counts_over_the_set() -> None:
    # bigrams: "a b" "b c" and "a b" "b d" -> 3 distinct of 4
    assert metrics.distinct(["a b c", "a b d"]) == pytest.approx(0.75)
    assert metrics.distinct([]) == 0.0


def test_words_keep_hyphens_and_accents_together() -> None:
    assert metrics.words("It's family-friendly, near Café Sicilia.") == [
        "it's",
        "family-friendly",
        "near",
        "café",
        "sicilia",
    ]
    assert len(metrics.words("£20-25, please")) == 2


def test_words_of_every_script() -> None:
    assert metrics.words("我喜欢 Tokyo") == ["我", "喜", "欢", "tokyo"]
    assert metrics.words("हिन्दी café") == ["हिन्दी", "café"]
    assert metrics.words("cafe\u0301") == ["café"]
    assert metrics.repetition("好好好好好") > 0.5
    assert metrics.lexical_relevance("我喜欢北京的秋天", "北京的秋天很美") == pytest.approx(5 / 8)


def test_rouge_l_of_every_script() -> None:
    assert metrics.rouge_l("Привет, мир!", ["привет мир"]) == 1.0
    assert metrics.rouge_l("北京的秋天很美", ["我喜欢北京的秋天"]) == pytest.approx(2 * 5 / (7 + 8))
    assert metrics.rouge_l("café", ["cafe"]) == 0.0


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_rouge_words_of_english_are_those_of_rouge_score(text: str) -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    ours = metrics._rouge_scorer("rougeL")._tokenizer
    assert ours.tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


def test_word_weights_by_hand() -> None:
    weights = metrics.word_weights(["name cat", "name dog", "name dog"])
    assert weights == {"name": 0.0, "cat": pytest.approx(math.log(3)), "dog": pytest.approx(math.log(1.5))}
    assert metrics.word_weights(["one prompt"]) == {"one": 1.0, "prompt": 1.0}
    # log(10/9) is below a tenth of log(10)
    assert metrics.word_weights(["of"] * 9 + ["cat"])["of"] == 0.0


def test_lexical_relevance_by_hand() -> None:
    weights = {"name": 0.0, "cat": 3.0, "dog": 1.0}
    assert metrics.lexical_relevance("name cat dog", "A cat.", weights) == pytest.approx(0.75)
    assert metrics.lexical_relevance("name cat dog", "name", weights) == 0.0
    assert metrics.lexical_relevance("cat dog", "a dog") == pytest.approx(0.5)
    assert metrics.lexical_relevance("name", "name", weights) == 0.0  # nothing to be relevant to
    assert metrics.lexical_relevance("zebra dog", "zebra", weights) == pytest.approx(0.75)  # unseen: as the rarest


class Letters:
    """A tokenizer of letters: id 1 begins a text, a is 2, b is 3, ..."""

    bos_token_id = 1
    eos_token_id = 0
    unk_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True, **options: bool) -> dict[str, Any]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - ord("a") + 2 for letter in text]}


def judge() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def test_perplexity_of_a_judge_that_knows_nothing_is_the_vocabulary() -> None:
    model = judge()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, Letters(), ["abc", ""], ["de", "abcdefgh"])
    assert result == pytest.approx([30.0, 30.0], rel=1e-5)


def test_perplexity_is_that_of_each_answer_alone_given_its_prompt() -> None:
    model, tokenizer = judge(), Letters()
    model.train()
    prompts, answers = ["abc", "a", "zyxwv"], ["de", "abcdefgh", "q"]
    together = perplexity(model, tokenizer, prompts, answers, batch_size=2)
    assert model.training  # left as it was
    model.eval()
    for value, prompt, answer in zip(together, prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        assert value == pytest.approx(math.exp(-logp[-len(answer) :].mean()), rel=1e-4)
    other = perplexity(model, tokenizer, ["q"], ["de"])
    assert other[0] != pytest.approx(together[0], rel=1e-3)  # the prompt counts


def test_perplexity_names_what_it_cant_judge() -> None:
    model = judge()
    assert math.isnan(perplexity(model, Letters(), ["a"], [""])[0])
    with pytest.raises(ModelError, match="33 tokens"):
        perplexity(model, Letters(), ["a"], ["a" * 31])


def test_interval_of_a_constant_has_no_width() -> None:
    interval = intervals.mean_interval(np.full((3, 5), 0.25))
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_interval_is_that_of_the_normal_approximation_for_many_prompts() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=900)
    interval = intervals.mean_interval(values, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(900)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_holds_the_spread_between_seeds() -> None:
    # All prompts agree, the seeds don't: resampling prompts alone would claim certainty.
    table = np.tile(np.array([[0.0], [1.0], [2.0], [3.0], [4.0]]), (1, 500))
    interval = intervals.mean_interval(table)
    half = 1.96 * math.sqrt(2.0) / math.sqrt(5)  # variance of 0..4 is 2
    assert interval.low == pytest.approx(2 - half, abs=0.25)
    assert interval.high == pytest.approx(2 + half, abs=0.25)


def test_interval_draws_prompts_alike_for_all_seeds() -> None:
    # Prompts differ, seeds don't: five seeds are no more evidence than one.
    prompts = np.random.default_rng(2).normal(size=200)
    one, five = intervals.mean_interval(prompts), intervals.mean_interval(np.tile(prompts, (5, 1)))
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.1)


def test_pairing_takes_out_how_hard_the_prompts_are() -> None:
    generator = np.random.default_rng(3)
    before = generator.normal(0, 1, size=(5, 300))
    after = before - 0.1 + generator.normal(0, 0.05, size=(5, 300))
    interval = intervals.paired_difference(after, before)
    assert interval.high < 0
    assert interval.low < -0.09
    assert interval.high - interval.low < 0.05
    with pytest.raises(ValueError, match="one shape"):
        intervals.paired_difference(after, before[0])


def test_interval_refuses_what_it_cant_use() -> None:
    with pytest.raises(ValueError, match="finite"):
        intervals.mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="shape"):
        intervals.mean_interval([])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(1, 4))
def test_interval_lies_within_the_values(values: list[float], seeds: int) -> None:
    interval = intervals.mean_interval(np.tile(values, (seeds, 1)), resamples=50)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.text("ab .,", max_size=40), st.integers(1, 4))
def test_shares_lie_between_0_and_1(text: str, n: int) -> None:
    assert 0.0 <= metrics.repetition(text, n) < 1.0
    assert 0.0 <= metrics.distinct([text], n) <= 1.0
