"""Words pooled while reading, and chosen columns alone: what pooling and choosing afterwards give."""

import pytest
import torch

from cagsr.attention import AttentionRegion, PromptAttentionReader, chosen_columns, rows
from cagsr.errors import AttentionError
from cagsr.reward.pooling import pool_pieces
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.terms.grounded_coverage import grounded_coverage_gains
from cagsr.reward.terms.mean_mass import mean_mass
from test_attention_models import batch_for, captured_attention, decoder_batch, tiny_model


def words_for(region, num_words=3, seed=0):
    """Random words for the region's columns, the first and last token of each prompt without one."""
    torch.manual_seed(seed)
    words = torch.randint(-1, num_words, region.columns.shape).masked_fill(region.columns < 0, -1)
    words[:, 0] = -1
    return words


def read(model, batch, region, **options):
    with PromptAttentionReader(model, layers="all").read(region, **options) as reading:
        model(**batch.inputs)
    return reading.attention


def test_chosen_columns_by_hand():
    chosen = torch.tensor([[True, False, True, False], [False, False, False, True], [False] * 4])
    assert chosen_columns(chosen).tolist() == [[0, 2], [3, -1], [-1, -1]]
    assert chosen_columns(torch.zeros(2, 3).bool()).shape == (2, 0)


@pytest.mark.parametrize("elements", [20, 10**6])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "t5", "bart"])
def test_pooling_while_reading_equals_pooling_afterwards(name, side, implementation, elements, monkeypatch):
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(rows, "_NARROWEST", 2)
    model = tiny_model(name, attn_implementation=implementation)
    batch = batch_for(name, model, side)
    words = words_for(batch.region)
    expected = pool_pieces(captured_attention(model, batch), words, 4)
    with torch.no_grad():
        found = read(model, batch, batch.region.pooled(words, 4))
    assert found.shape == (3, batch.region.shape[1], 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found[..., 3] == 0).all()  # a word without a token


def test_packed_sequences_are_pooled():
    model = tiny_model("llama", attn_implementation="sdpa")
    batch = decoder_batch(model, "right", prompts=(7, 4), responses=(3, 5))
    words = words_for(batch.region)
    expected = pool_pieces(captured_attention(model, batch), words, 3)
    real = batch.inputs["attention_mask"].bool()
    ids, positions = batch.inputs["input_ids"][real][None], batch.inputs["position_ids"][real][None]
    region = AttentionRegion.packed(torch.tensor([7, 4]), torch.tensor([3, 5])).pooled(words, 3)
    with torch.no_grad(), PromptAttentionReader(model, layers="all").read(region) as reading:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(reading.attention, expected, rtol=0, atol=1e-6)


def test_gradients_through_pooled_words():
    model = tiny_model("llama")
    batch = decoder_batch(model)
    words = words_for(batch.region)
    weights = torch.randn(3, batch.region.shape[1], 3)
    weight = model.model.layers[0].self_attn.q_proj.weight

    def gradient(found):
        model.zero_grad()
        (found * weights).sum().backward()
        return weight.grad.clone()

    pooled = gradient(read(model, batch, batch.region.pooled(words, 3), with_gradients=True))
    full = gradient(pool_pieces(read(model, batch, batch.region, with_gradients=True), words, 3))
    assert full.abs().max() > 1e-3
    torch.testing.assert_close(pooled, full, rtol=0, atol=1e-5)


def test_the_terms_of_the_reward_lose_nothing():
    model = tiny_model("llama", attn_implementation="sdpa")
    batch = decoder_batch(model)
    region, mask = batch.region, batch.response_mask.bool()
    words, salience = words_for(region), torch.rand(3, 3)
    width = region.shape[2]
    prompt_ids, response_ids = batch.inputs["input_ids"].split([width, region.shape[1]], dim=1)
    prompt_ids, response_ids = prompt_ids % 5, response_ids % 5  # few tokens, so that some are the same
    whole = captured_attention(model, batch)
    with torch.no_grad():
        pooled = read(model, batch, region.pooled(words, 3))
        index = chosen_columns(words >= 0)
        tokens = read(model, batch, region.only(index))
    assert tokens.shape[2] < whole.shape[2]
    torch.testing.assert_close(
        saturating_coverage(pooled, salience, mask, 0.3),
        saturating_coverage(pool_pieces(whole, words, 3), salience, mask, 0.3),
        rtol=0,
        atol=1e-6,
    )
    of_tokens = words.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
    same = (response_ids[:, :, None] == prompt_ids[:, None, :]) & mask[:, :, None] & (words >= 0)[:, None, :]
    of_chosen = same.gather(2, index.clamp(min=0)[:, None, :].expand(*mask.shape, -1)) & (index >= 0)[:, None, :]
    gains = grounded_coverage_gains(tokens, of_chosen, of_tokens, salience, 0.3)
    expected = grounded_coverage_gains(whole, same, words, salience, 0.3)
    assert expected.sum() > 0.01
    torch.testing.assert_close(gains, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean_mass(tokens, of_tokens, mask), mean_mass(whole, words, mask), rtol=0, atol=1e-6)


def test_words_that_do_not_fit_are_refused():
    region = AttentionRegion.left_padded(torch.ones(2, 5), torch.ones(2, 3))
    words = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(AttentionError, match=r"shape \(2, 5\) and indices below 0"):
        region.pooled(words, 0)
    with pytest.raises(AttentionError, match=r"shape \(2, 4\)"):
        region.pooled(words[:, :4], 1)
    with pytest.raises(AttentionError, match="below 5"):
        region.only(torch.tensor([[0], [5]]))
    with pytest.raises(AttentionError, match="narrowed"):
        region.pooled(words, 1).only(torch.zeros(2, 1, dtype=torch.int64))
