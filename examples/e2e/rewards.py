"""The ceiling and the floor for the comparison: the slot checker itself as reward, and a random number.

TRL-style reward functions for ``reward.functions``, as ``examples.e2e.rewards.slot_hits``; and ``hits`` for
``evaluation.metric``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from examples.e2e.slots import check


def slot_hits(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """Share of the prompt's facts that are said, less the added facts over the prompt's facts; at most 1.

    The ceiling: what reinforcement learning gains when the reward is the truth itself. Raises ValueError where a prompt is
    no meaning representation.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        report = check(prompt, completion)
        rewards.append(report.hits - len(report.added) / report.facts)
    return rewards


def random_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """A number between 0 and 1 that says nothing, the same for the same prompt and answer: the floor."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        digest = hashlib.blake2b(f"{prompt}\0{completion}".encode(), digest_size=8).digest()
        rewards.append(int.from_bytes(digest, "big") / 2**64)
    return rewards


def net_hits(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """What :func:`slot_hits` gives, as a metric to watch."""
    return slot_hits(prompts, completions, [])


def hits(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of each prompt's facts that its answer says; a metric to watch, no reward."""
    return [check(prompt, completion).hits for prompt, completion in zip(prompts, completions, strict=True)]


def report(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[dict[str, float]]:
    """Missed, wrong and added facts of each answer, as shares of its prompt's facts; for ``--checker``."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        one = check(prompt, completion)
        shares = {"missed": len(one.missed), "wrong": len(one.wrong), "added": len(one.added)}
        found.append({name: count / one.facts for name, count in shares.items()})
    return found


def added(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Added facts of each answer over its prompt's facts; a truth to correlate with, lower is better."""
    return [one["added"] for one in report(prompts, completions)]
