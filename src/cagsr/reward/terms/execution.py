"""Execution: does the program pass its tests? A verifiable reward for code; untrusted programs run in a sandbox or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import PartialValues
from cagsr.sandbox.run import SandboxConfig, check_protection
from cagsr.tasks.code import row_tests, run_answers

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class ExecutionConfig(TermConfig):
    """Execution (not label-free): 1 where the answer's program passes the row's tests, else 0."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """What a program may use up."""


@register
@dataclass(frozen=True)
class Execution:
    """Execution, :func:`cagsr.tasks.code.run_answers`; ConfigError where the machine can't protect itself."""

    name: ClassVar[str] = "execution"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 19
    shown: ClassVar[bool] = False
    settings: ExecutionConfig

    def __post_init__(self) -> None:
        check_protection(self.settings.sandbox, "--reward.execution.sandbox.unprotected")

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)``; it applies to rows that have tests."""
        episodes = batch.episodes
        outcomes = run_answers(episodes.prompts.prompts, episodes.completions, self.settings.sandbox)
        values = [float(one is not None and one.kind == "passed") for one in outcomes]
        there = [one is not None for one in outcomes]
        device = episodes.ids.device
        return PartialValues(torch.tensor(values, device=device), torch.tensor(there, device=device))

    @staticmethod
    def missing(settings: ExecutionConfig, prompts: Iterable[Prompt]) -> str | None:
        """Tests."""
        there = any(row_tests(one.columns) is not None for one in prompts)
        return None if there else "tests: columns test and entry_point (HumanEval), test_list (MBPP), or tests"

    @staticmethod
    def advice(settings: ExecutionConfig, reward: RewardConfig) -> Iterator[str]:
        """Under which protection code runs."""
        if settings.weight != 0:
            yield check_protection(settings.sandbox, "--reward.execution.sandbox.unprotected")
