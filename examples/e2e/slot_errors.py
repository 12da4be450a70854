"""Slot error rate, in % of all slots of a set of prompts, beside the shares of ``examples.e2e.rewards.report``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.e2e.rewards import report as shares
from examples.e2e.slots import check


def report(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[dict[str, float]]:
    """Missed, wrong and added facts of each answer as shares of its own facts, and its ``slot_error_rate``; for ``--checker``.

    ``missed`` holds ``wrong``, so missed + added are all errors: in published tables missed, wrong and added apart. The rate of a
    set is its errors over its slots, where a prompt of many slots counts more; so an answer's errors are divided by the mean
    number of slots of all the prompts handed in, and the mean over the set is the set's rate.
    """
    reports = [check(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    slots = float(np.mean([one.facts for one in reports]))
    rates = [100.0 * (len(one.missed) + len(one.added)) / slots for one in reports]
    return [{**own, "slot_error_rate": rate} for own, rate in zip(shares(prompts, completions), rates, strict=True)]
