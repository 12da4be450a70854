"""Preference pairs split by prompt, and nested subsets of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from cagsr.errors import ConfigError

RowT = TypeVar("RowT")


def prompt_key(row: Any) -> Hashable:
    """What makes two rows pairs of the same prompt: the text or messages of a mapping's ``prompt``, or ``row.prompt.text``."""
    if isinstance(row, Mapping):
        return json.dumps(row["prompt"], sort_keys=True, ensure_ascii=False)
    return str(row.prompt.text)


def split_by_prompt(
    rows: Sequence[RowT], share: float, seed: int, *, key: Callable[[RowT], Hashable] = prompt_key
) -> tuple[list[RowT], list[RowT]]:
    """Split rows so that no prompt is on both sides; each side keeps the rows' order.

    Args:
        rows: preference rows or pairs.
        share: share of the *prompts* held out, rounded to whole prompts, at least one on each side; 0 holds none out.
        seed: which prompts.
        key: what makes two rows the same prompt.

    Returns:
        ``(training rows, held-out rows)``.

    Raises:
        ConfigError: there is only one prompt to split.
    """
    if share == 0:
        return list(rows), []
    # Sorted, so that the choice depends on which prompts there are and not on the order of the file.
    prompts = sorted({key(row) for row in rows}, key=_order)
    if len(prompts) < 2:
        raise ConfigError(f"--held_out {share:g}: with {len(prompts)} prompt there is nothing to split; set it to 0.")
    count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    chosen = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if key(row) not in chosen], [row for row in rows if key(row) in chosen]


def subset(rows: Sequence[RowT], num_pairs: int | None, seed: int) -> list[RowT]:
    """Draw ``num_pairs`` rows in random order; with one seed a smaller subset is the beginning of a larger one.

    Every row is a label that somebody gave, so pairs are counted and not prompts. None takes all rows.

    Raises:
        ConfigError: more rows than there are.
    """
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    if num_pairs is None:
        return [rows[index] for index in order]
    if num_pairs > len(rows):
        raise ConfigError(f"--num_pairs {num_pairs}: there are {len(rows)} pairs to train on; give 1 to {len(rows)}.")
    return [rows[index] for index in order[:num_pairs]]


def _order(key: Hashable) -> str:
    # Sets print their members in an order that changes from run to run.
    return repr(sorted(map(repr, key)) if isinstance(key, frozenset) else key)
