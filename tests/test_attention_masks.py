"""Every form of mask gives the rows that transformers' own mask functions give; the mathematics, by hand."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from cagsr.attention.intercept import Intercepted
from cagsr.attention.masks import LOWEST, mask_rows
from cagsr.attention.plan import Piece, plan_region
from cagsr.attention.probabilities import Softmax
from cagsr.attention.region import AttentionRegion
from cagsr.attention.rows import BLOCK_ELEMENTS, add_prompt_attention
from cagsr.errors import AttentionError

BATCH, KEYS = 3, 10
ALL = slice(0, BATCH)


def call(implementation, mask=None, queries=KEYS, keys=KEYS, batch=BATCH, **options):
    return Intercepted(implementation, torch.zeros(batch, 2, queries, 4), torch.zeros(batch, 1, keys, 4), mask, options)


def seen(rows, keys=KEYS, batch=BATCH):
    assert rows.dtype == torch.float32
    return (rows == 0).expand(batch, 1, -1, keys)


def reference(function, padding=None, queries=KEYS, batch=BATCH):
    return sdpa_mask(
        batch, queries, KEYS, q_offset=KEYS - queries, mask_function=function, attention_mask=padding,
        allow_is_causal_skip=False,
    )  # fmt: skip


PADDINGS = {
    "left": torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] * 2 + [1] * 8]).bool(),
    "right": torch.tensor([[1] * 6 + [0] * 4, [1] * 10, [1] * 8 + [0] * 2]).bool(),
}


@pytest.mark.parametrize("rows", [slice(3, 8), torch.tensor([[3, 4], [0, 9], [7, 7]])], ids=["slice", "gather"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_flash_masks_equal_the_sdpa_masks(side, window, rows):
    padding = None if side is None else PADDINGS[side]
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    full = reference(function, padding)
    index = torch.arange(rows.start, rows.stop).expand(BATCH, -1) if isinstance(rows, slice) else rows
    expected = full[torch.arange(BATCH)[:, None], 0, index][:, None]
    actual = seen(mask_rows(call("flash_attention_2", padding, sliding_window=window), True, ALL, rows))
    # Flash attention drops padding queries, so what their rows see has no meaning.
    real = torch.ones(BATCH, KEYS).bool() if padding is None else padding
    real = real.gather(1, index)[:, None, :, None]
    assert torch.equal(actual & real, expected & real)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_flash_counts_queries_from_the_last_key(queries, window):
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    expected = reference(function, PADDINGS["left"], queries)
    made = call("flash_attention_2", PADDINGS["left"], queries, sliding_window=window)
    assert torch.equal(seen(mask_rows(made, True, ALL, slice(0, queries))), expected)


@pytest.mark.parametrize("form", ["position_ids", "cu_seq_lens_k"])
def test_flash_keeps_packed_sequences_apart(form):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    packed = and_masks(causal_mask_function, packed_sequence_mask_function(find_packed_sequence_indices(positions)))
    option = positions if form == "position_ids" else torch.tensor([0, 3, 5, 10], dtype=torch.int32)
    made = call("flash_attention_2", batch=1, **{form: option})
    assert torch.equal(seen(mask_rows(made, True, slice(0, 1), slice(0, KEYS)), batch=1), reference(packed, batch=1))


@pytest.mark.parametrize("rows", [slice(3, 8), torch.tensor([[3, 4], [0, 9], [7, 7]])], ids=["slice", "gather"])
def test_flex_block_masks_are_asked_for_our_rows(rows):
    padding = PADDINGS["left"]

    def function(batch, head, row, column):
        return (column <= row) & padding[batch, column]

    block = create_block_mask(function, BATCH, None, KEYS, KEYS, device="cpu")
    index = torch.arange(rows.start, rows.stop).expand(BATCH, -1) if isinstance(rows, slice) else rows
    expected = reference(causal_mask_function, padding)[torch.arange(BATCH)[:, None], 0, index][:, None]
    assert torch.equal(seen(mask_rows(call("flex_attention", block), True, ALL, rows)), expected)


@pytest.mark.parametrize(
    ("implementation", "causal", "queries", "expected"),
    [
        ("sdpa", True, KEYS, "causal"),
        ("sdpa", True, 4, "causal"),  # an empty static cache: counted from the upper left
        ("sdpa", True, 1, None),
        ("sdpa", False, KEYS, None),
        ("eager", True, KEYS, None),
        ("flex_attention", True, KEYS, None),
        ("flash_attention_2", False, KEYS, None),
    ],
)
def test_what_no_mask_means(implementation, causal, queries, expected):
    rows = mask_rows(call(implementation, queries=queries), causal, ALL, slice(0, queries))
    if expected is None:
        assert rows is None
    else:
        assert torch.equal(seen(rows)[0, 0], torch.ones(queries, KEYS).tril().bool())


def test_additive_masks_lose_their_infinities_and_extra_keys():
    mask = torch.zeros(BATCH, 1, KEYS, KEYS + 3, dtype=torch.bfloat16)
    mask[..., 2], mask[..., 3] = -torch.inf, 1.5
    rows = mask_rows(call("sdpa", mask), True, ALL, slice(4, 6))
    assert rows.shape == (BATCH, 1, 2, KEYS)
    assert rows[0, 0, 0, :5].tolist() == [0, 0, LOWEST, 1.5, 0]


def test_masks_of_another_form_are_refused():
    with pytest.raises(AttentionError, match=r"shape \(3, 10\)"):
        mask_rows(call("sdpa", PADDINGS["left"]), True, ALL, slice(0, 1))
    with pytest.raises(AttentionError, match="flash_attention_2"):
        mask_rows(call("flash_attention_2", torch.zeros(1, 1, 1, 1)), True, ALL, slice(0, 1))


def test_softmax_by_hand():
    # One query of 1, two keys; scores 2 and 4 after scaling by 2.
    query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[1.0], [2.0]]]])
    piece = Piece(slice(0, 1), slice(0, 1), slice(0, 2), slice(0, 1), (slice(0, 1), slice(0, 1), slice(0, 1)))

    def read(softmax):
        buffer = torch.zeros(1, 1, 1)
        add_prompt_attention(buffer, Intercepted("eager", query, key, None, {}), piece, softmax)
        return buffer.item()

    def share(first, *others):
        return math.exp(first) / (math.exp(first) + sum(map(math.exp, others)))

    bias = torch.tensor([[[[3.0, 0.5]]]])
    capped = [3 * math.tanh(2 / 3), 3 * math.tanh(4 / 3)]
    assert read(Softmax(2.0)) == pytest.approx(share(2, 4), abs=1e-6)
    assert read(Softmax(2.0, softcap=3.0)) == pytest.approx(share(*capped), abs=1e-6)
    assert read(Softmax(2.0, position_bias=bias)) == pytest.approx(share(5, 4.5), abs=1e-6)
    assert read(Softmax(2.0, sinks=torch.tensor([3.0]))) == pytest.approx(share(2, 4, 3), abs=1e-6)


def test_a_sliding_cache_shows_only_its_last_keys():
    # 9 keys seen, the cache holds the last 6 (positions 3 to 8): columns 0 to 2 have left.
    region = AttentionRegion.decoding(torch.ones(2, 7), fed=2)
    (piece,) = plan_region(region, call("sdpa", None, queries=1, keys=6, batch=2), causal=True)
    assert piece.columns == slice(0, 4)
    assert piece.target[2] == slice(3, 7)


@pytest.mark.parametrize("heads", [None, (1,), (0, 3), (1, 2, 3)])
@pytest.mark.parametrize("elements", [1, 37, 10**6])
def test_blocks_masks_and_biases_of_each_head_make_no_difference(heads, elements, monkeypatch):
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", elements)
    torch.manual_seed(0)
    query, key = torch.randn(BATCH, 4, KEYS, 4), torch.randn(BATCH, 2, KEYS, 4)
    mask, bias = torch.randn(BATCH, 4, KEYS, KEYS) * 3, torch.randn(1, 4, KEYS, KEYS)
    sinks = torch.randn(4)
    region = AttentionRegion.right_padded(torch.tensor([4, 2, 6]), torch.tensor([3, 5, 2]))
    made = Intercepted("sdpa", query, key, mask, {})
    buffer = torch.zeros(region.shape)
    for piece in plan_region(region, made, causal=True):
        add_prompt_attention(buffer, made, piece, Softmax(0.7, None, bias, sinks), heads)
    scores = 0.7 * query @ key.repeat_interleave(2, 1).transpose(2, 3) + bias + mask
    full = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(BATCH, 4, KEYS, 1)], -1).softmax(-1)[..., :-1]
    full = full[:, list(heads or range(4))].sum(1)
    index = torch.arange(BATCH)[:, None, None]
    expected = full[index, region.rows.clamp(min=0)[:, :, None], region.columns.clamp(min=0)[:, None, :]]
    valid = region.valid(buffer.device)
    torch.testing.assert_close(buffer * valid, expected * valid, rtol=0, atol=1e-5)
