"""Splits by prompt and nested subsets of preference pairs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagsr.errors import ConfigError
from cagsr.preferences.pairs import split_by_prompt, subset

Rows = list[dict[str, Any]]


def rows_of(counts: list[int]) -> Rows:
    return [{"prompt": f"p{prompt}", "pair": pair} for prompt, count in enumerate(counts) for pair in range(count)]


@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=30), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(counts: list[int], share: float, seed: int) -> None:
    rows = rows_of(counts)
    train, held_out = split_by_prompt(rows, share, seed)
    assert train
    assert held_out
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert sorted(map(str, train + held_out)) == sorted(map(str, rows))
    prompts = len({row["prompt"] for row in held_out})
    assert prompts == min(len(counts) - 1, max(1, round(share * len(counts))))


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = rows_of([3] * 40)
    first = {row["prompt"] for row in split_by_prompt(rows, 0.2, 0)[1]}
    assert first == {row["prompt"] for row in split_by_prompt(rows[::-1], 0.2, 0)[1]}
    assert first != {row["prompt"] for row in split_by_prompt(rows, 0.2, 1)[1]}
    assert split_by_prompt(rows, 0, 0) == (rows, [])


def test_a_key_of_ones_own_decides_what_one_prompt_is() -> None:
    rows: Rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("a b", "b a", "c d", "d c")]

    def key(row: dict[str, Any]) -> frozenset[str]:
        return frozenset(row["prompt"][0]["content"].split())

    train, held_out = split_by_prompt(rows, 0.5, 0, key=key)
    assert len(train) == len(held_out) == 2
    assert not {key(row) for row in train} & {key(row) for row in held_out}
    assert len(split_by_prompt(rows, 0.25, 0)[1]) == 1  # by default messages that differ are different prompts


@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_subsets_nest(sizes: list[int], seed: int) -> None:
    rows = list(range(50))
    small, large = sorted(sizes)
    assert subset(rows, small, seed) == subset(rows, large, seed)[:small]
    assert len(set(subset(rows, small, seed))) == small
    assert sorted(subset(rows, None, seed)) == rows


def test_what_is_refused() -> None:
    rows = rows_of([2, 2])
    with pytest.raises(ConfigError, match="nothing to split"):
        split_by_prompt(rows_of([3]), 0.1, 0)
    with pytest.raises(ConfigError, match=r"--num_pairs 5: .* 1 to 4"):
        subset(rows, 5, 0)
