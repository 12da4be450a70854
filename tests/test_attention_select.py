"""Layers and heads as users write them."""

import pytest

from cagsr.attention.select import parse_heads, parse_layers
from cagsr.errors import ConfigError


@pytest.mark.parametrize(
    ("layers", "available", "expected"),
    [
        ("last-4", range(6), (2, 3, 4, 5)),
        ("last-4", range(3), (0, 1, 2)),
        ("last-2", [1, 3, 5], (3, 5)),
        (" all ", [1, 3], (1, 3)),
        ("0,3", range(4), (0, 3)),
        ("3, 0,3", range(4), (0, 3)),
        ("-1", [1, 3], (3,)),
        ([-2, 3], [1, 3], (1, 3)),
    ],
)
def test_layers(layers, available, expected):
    assert parse_layers(layers, list(available)) == expected


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("last-0", "at least one"),
        ("last", "last-N, all, or layer numbers"),
        ("first-2", "first-2"),
        ("", "write last-N"),
        ([], "is empty"),
        ("1.5", "write last-N"),
        ([True], "write last-N"),
        ("4", "layer 4, but attention can be read from layers 0 to 3"),
        ("-5", "layer -5"),
    ],
)
def test_bad_layers(layers, said):
    with pytest.raises(ConfigError, match=said):
        parse_layers(layers, [0, 1, 2, 3])


def test_heads():
    counts = {1: 4, 3: 2}
    assert parse_heads("all", counts) == {1: None, 3: None}
    assert parse_heads("1,0", counts) == {1: (0, 1), 3: None}  # both of the two heads of layer 3 are all of them
    assert parse_heads([-1], counts) == {1: (3,), 3: (1,)}
    assert parse_heads({1: [2], 3: [0]}, counts) == {1: (2,), 3: (0,)}


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ("2", "head 2, but layer 3 has heads 0 to 1"),
        ("some", "all, or head numbers"),
        ([], "is empty"),
        ({1: [0]}, r"layers \[1\], but the layers read are \[1, 3\]"),
    ],
)
def test_bad_heads(heads, said):
    with pytest.raises(ConfigError, match=said):
        parse_heads(heads, {1: 4, 3: 2})
