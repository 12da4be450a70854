"""Where the time goes: parts add up, the table's figures by hand, operators of a real step."""

from __future__ import annotations

import time

import pytest
import torch

from cagsr.support.clock import OPERATORS, Clock, operators_of, peak_memory_bytes, profile_text

CPU = torch.device("cpu")


def test_parts_add_up_and_are_taken_once():
    clock = Clock(CPU)
    for _ in range(2):
        with clock.part("rollout"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="x"), clock.part("update"):
        raise ValueError("x")
    taken = clock.take()
    assert 0.04 <= taken["rollout"] < 1.0
    assert taken["update"] < taken["rollout"]
    assert clock.take() == {}


def test_the_table_by_hand():
    step = {"collect_seconds": 3.0, "update_seconds": 1.0, "evaluation_seconds": 0.0, "response_tokens": 100.0}
    steps = [
        step | {"rollout_seconds": 2.0, "backward_seconds": 0.5, "peak_memory_bytes": 2.0**30},
        step | {"rollout_seconds": 1.0, "evaluation_seconds": 2.0, "peak_memory_bytes": 2.0**29},
    ]
    text = profile_text(steps, [("aten::mm", 0.25, 7)])
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    # 10 seconds in all: 3 of rollout, 0.5 backward, 2 evaluation, the rest is in no part.
    assert rows["rollout"] == "| rollout | 1.500 | 30.0% |"
    assert rows["backward"] == "| backward | 0.250 | 5.0% |"
    assert rows["evaluation"] == "| evaluation | 1.000 | 20.0% |"
    assert rows["other"] == "| other | 2.250 | 45.0% |"
    assert "Answers: 25 tokens per second" in text  # 200 tokens in the 8 seconds that are no evaluation
    assert "Peak memory: 1,024 MiB" in text
    assert rows["aten::mm"] == "| aten::mm | 0.250 | 7 |"


def test_operators_of_a_product():
    found: list[tuple[str, float, int]] = []
    a = torch.randn(200, 200)
    with operators_of(found, CPU):
        for _ in range(30):
            a = torch.tanh(a @ a)
    assert len(found) <= OPERATORS
    assert ("aten::mm", 30) in [(name, calls) for name, _, calls in found]
    assert [seconds for _, seconds, _ in found] == sorted((seconds for _, seconds, _ in found), reverse=True)


def test_peak_memory_is_this_process():
    before = peak_memory_bytes(CPU)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert before > 64 * 2**20
    assert peak_memory_bytes(CPU) >= before
    assert held.sum() > 0
