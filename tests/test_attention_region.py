"""Regions: each layout gives the rows that predict response tokens and the columns of prompt tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cagsr.attention import AttentionRegion
from cagsr.errors import AttentionError


def test_left_padded_by_hand():
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1]])
    response = torch.tensor([[1, 1], [1, 0]])
    region = AttentionRegion.left_padded(prompt, response)
    # The last prompt token (position 2) predicts the first response token.
    assert region.rows.tolist() == [[2, 3], [2, -1]]
    assert region.columns.tolist() == [[-1, 1, 2], [0, 1, 2]]
    assert (region.row_slice, region.column_slice) == (slice(2, 4), slice(0, 3))
    assert region.shape == (2, 2, 3)
    assert region.valid(torch.device("cpu"))[1].tolist() == [[True] * 3, [False] * 3]


def test_right_padded_by_hand():
    region = AttentionRegion.right_padded(torch.tensor([2, 3]), torch.tensor([3, 1]))
    assert region.rows.tolist() == [[1, 2, 3], [2, -1, -1]]
    assert region.columns.tolist() == [[0, 1, -1], [0, 1, 2]]


def test_packed_by_hand():
    lengths = torch.tensor([2, 3, 1]), torch.tensor([3, 1, 2])
    region = AttentionRegion.packed(*lengths)
    assert region.batch.tolist() == [0, 0, 0]
    assert region.rows.tolist() == [[1, 2, 3], [7, -1, -1], [9, 10, -1]]
    assert region.columns.tolist() == [[0, 1, -1], [5, 6, 7], [9, -1, -1]]
    in_two_rows = AttentionRegion.packed(*lengths, batch=torch.tensor([0, 1, 1]))
    assert in_two_rows.rows.tolist() == [[1, 2, 3], [2, -1, -1], [4, 5, -1]]
    assert in_two_rows.columns.tolist() == [[0, 1, -1], [0, 1, 2], [4, -1, -1]]


def test_encoder_decoder_and_decoding_by_hand():
    prompt = torch.tensor([[1, 1, 0], [1, 1, 1]])
    region = AttentionRegion.encoder_decoder(prompt, torch.tensor([[1, 1], [1, 0]]))
    assert region.rows.tolist() == [[0, 1], [0, -1]]
    assert region.columns.tolist() == [[0, 1, -1], [0, 1, 2]]
    step = AttentionRegion.decoding(torch.tensor([[0, 1, 1]]).expand(2, 3), fed=4, alive=torch.tensor([1, 0]))
    assert step.rows.tolist() == [[0], [-1]]
    assert step.keys == 7


def test_what_was_said_since_is_looked_at_by_hand():
    """Prompts of two and three tokens; responses of four, of which the first sequence's second and third are looked at."""
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1]])
    sampled = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0]])
    looked_at = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    region = AttentionRegion.left_padded(prompt, sampled, looked_at)
    # Token t is predicted at position 2 + t; columns are positions, and the last token is not fed: nothing looks at it.
    assert region.rows.tolist() == [[2, -1, -1, 5], [2, 3, -1, -1]]
    assert region.columns.tolist() == [[-1, 1, 2, -1, 4, 5], [0, 1, 2, -1, -1, -1]]
    assert (region.row_slice, region.column_slice) == (slice(2, 6), slice(0, 6))
    assert region.shape == (2, 4, 6)
    assert region.valid(torch.device("cpu"))[0, 3].tolist() == [False, True, True, False, True, True]
    # Behind the prompts' cache the first token's row is missing, and positions are counted from the first cached key.
    behind = AttentionRegion.after_prefix(prompt, sampled[:, 1:], looked_at)
    assert behind.rows.tolist() == [[-1, -1, 2], [0, -1, -1]]
    assert torch.equal(behind.columns, region.columns)
    assert (behind.row_slice, behind.column_slice, behind.keys) == (slice(0, 3), slice(0, 6), 6)
    assert behind.shape == (2, 3, 6)


def test_nothing_to_look_at_is_the_prompt_alone():
    prompt, response = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1]])
    plain = AttentionRegion.left_padded(prompt, response)
    found = AttentionRegion.left_padded(prompt, response, torch.zeros(1, 2))
    assert torch.equal(found.rows, plain.rows)
    assert found.columns.tolist() == [[*plain.columns[0].tolist(), -1]]
    # A response of one token is fed to nothing.
    assert AttentionRegion.left_padded(prompt, response[:, :1], torch.ones(1, 1)).columns.tolist() == [[-1, 1, 2]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5))
def test_packed_is_right_padded_moved(lengths):
    prompt, response = (torch.tensor(numbers) for numbers in zip(*lengths, strict=True))
    packed, padded = AttentionRegion.packed(prompt, response), AttentionRegion.right_padded(prompt, response)
    starts = (prompt + response).cumsum(0) - prompt - response
    for name in ("rows", "columns"):
        moved, plain = getattr(packed, name), getattr(padded, name)
        assert torch.equal(moved, torch.where(plain >= 0, plain + starts[:, None], -1))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: AttentionRegion.left_padded(torch.tensor([[1, 1], [1, 0]]), torch.ones(2, 1)),
            "sequence 1 does not end",
        ),
        (lambda: AttentionRegion.left_padded(torch.ones(2, 2), torch.ones(3, 1)), "prompt mask"),
        (lambda: AttentionRegion.left_padded(torch.ones(2, 0), torch.ones(2, 1)), "no columns"),
        (lambda: AttentionRegion.right_padded(torch.tensor([2, 0]), torch.tensor([1, 1])), "sequence 1 has no tokens"),
        (lambda: AttentionRegion.packed(torch.tensor([2]), torch.tensor([1, 1])), "one number a sequence"),
        (lambda: AttentionRegion.decoding(torch.ones(1, 2), fed=0), "at least one"),
        (lambda: AttentionRegion(torch.arange(2), torch.zeros(3, 1), torch.zeros(2, 1)), "as many rows"),
        (lambda: AttentionRegion(torch.arange(2), torch.zeros(2), torch.zeros(2, 1)), "rows \\(n, response\\)"),
    ],
)
def test_bad_regions_are_refused(make, said):
    with pytest.raises(AttentionError, match=said):
        make()
