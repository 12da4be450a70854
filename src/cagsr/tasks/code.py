"""Code: from a prompt and an answer to the program that is tested, and a second turn in which a failing one is mended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cagsr.errors import DataError
from cagsr.flow import Episode, Prompt
from cagsr.sandbox.run import Outcome, SandboxConfig, check_protection, run_programs

_FENCE = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_BEHIND = re.compile(r"\n(?=def |class |if __name__|print\(|assert |import |from |@|#|```)")
"""Where the body of a function has ended: the first line that is not indented and begins something else."""
_MENDED = "# Mended:"
_IMPORT = re.compile(r"^(?:from [\w.]+ import .+|import .+)$", re.MULTILINE)


def row_tests(columns: Mapping[str, Any]) -> str | None:
    """The tests of a row: HumanEval's (``test``, ``entry_point``), MBPP's (``test_list``, with ``test_setup_code`` or
    ``test_imports`` before it), or ``tests``, text or list; None where there are none.
    """
    if columns.get("test") and columns.get("entry_point"):
        return f"{columns['test']}\n\ncheck({columns['entry_point']})\n"
    given = columns.get("test_list") or columns.get("tests")
    if not given:
        return None
    setup = columns.get("test_setup_code") or columns.get("test_imports") or ""
    parts = [given] if isinstance(given, str) else [str(one) for one in given]
    before = [setup] if isinstance(setup, str) else [str(one) for one in setup]
    return "\n".join([*before, *parts]) + "\n"


def code_of(prompt: Prompt, completion: str) -> str:
    """The program that an answer to a prompt makes, without its tests.

    A block between fences is the program; so is an answer that defines the row's ``entry_point``. Else the answer goes on where a
    plain prompt stops (HumanEval), up to the first line that is no longer part of it. Imports of the prompt are kept.
    """
    written = (
        prompt.text if prompt.messages is None else "\n".join(str(one["content"] or "") for one in prompt.messages)
    )
    fenced = _FENCE.findall(completion)
    code = "\n\n".join(fenced) if fenced else completion
    name = prompt.columns.get("entry_point")
    whole = bool(fenced) or (name is not None and re.search(rf"^\s*def {re.escape(str(name))}\b", code, re.MULTILINE))
    if whole or prompt.messages is not None:
        return "\n".join([*_IMPORT.findall(written), code])
    return prompt.text.rpartition(f"\n{_MENDED}\n")[2] + _BEHIND.split(code, maxsplit=1)[0]


def run_answers(prompts: Sequence[Prompt], completions: Sequence[str], config: SandboxConfig) -> list[Outcome | None]:
    """Run the answers' programs with their rows' tests in the sandbox; None where a row has none.

    DataError where none has; ConfigError where the machine can't protect itself.
    """
    tests = [row_tests(prompt.columns) for prompt in prompts]
    if prompts and not any(tests):
        raise DataError(
            "no row has tests for its program: give columns test and entry_point (HumanEval), test_list (MBPP), or tests."
        )
    asked = [
        f"{code_of(prompt, text)}\n\n{test}"
        for prompt, text, test in zip(prompts, completions, tests, strict=True)
        if test is not None
    ]
    outcomes = iter(run_programs(asked, config))
    return [None if test is None else next(outcomes) for test in tests]


@dataclass(frozen=True)
class Repair:
    """A task: where the program of an answer fails its row's tests, the model is shown how, and answers once more.

    Name it in ``rollout.task``; derive from it to change its settings.
    """

    turns: int = 2
    """Answers, at most."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    lines: int = 12
    """Of a traceback the last lines are shown."""

    def __post_init__(self) -> None:
        check_protection(self.sandbox, "a sandbox with unprotected=True")

    def reply(self, episode: Episode) -> str | None:
        """How the program failed; None where it did not."""
        return self.replies([episode])[0]

    def replies(self, episodes: Sequence[Episode]) -> list[str | None]:
        """The same of many, whose programs run side by side."""
        said: list[str | None] = [None] * len(episodes)
        asked = [place for place, one in enumerate(episodes) if len(one.answers) < self.turns]
        if not asked:
            return said
        told = [episodes[place] for place in asked]
        outcomes = run_answers([one.first.prompt for one in told], [one.answers[-1] for one in told], self.sandbox)
        for place, episode, outcome in zip(asked, told, outcomes, strict=True):
            if outcome is not None and outcome.kind != "passed":
                said[place] = self._shown(episode, outcome)
        return said

    def _shown(self, episode: Episode, outcome: Outcome) -> str:
        how = {"timed out": "It took too long.", "stopped": "It wrote too much."}.get(outcome.kind)
        told = how or "\n".join(outcome.output.strip().splitlines()[-self.lines :]) or "It ended before its tests did."
        if episode.first.prompt.messages is not None:
            return f"The tests failed:\n\n{told}\n\nWrite the whole program again, mended."
        # Behind a plain prompt the model goes on writing code: the failure stands there as a comment, then the task anew.
        shown = "\n".join(f"# {line}" for line in ("The tests failed:", *told.splitlines()))
        return f"\n\n{shown}\n{_MENDED}\n{episode.first.prompt.text}"
