"""Code: from a prompt and an answer to the program that is tested, and a second turn in which a failing one is mended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from cagsr.flow import Episode, Prompt
from cagsr.sandbox.run import Outcome, SandboxConfig, check_protection, run_programs

_FENCE = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
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

    Behind a plain prompt (HumanEval) an answer that begins with an indented line goes on with the function, up to its first line
    that is not indented. Else what stands between fences is the program; or the answer itself, where it defines the row's
    ``entry_point``, or the prompt is a conversation; or the prompt and the answer. Imports of the prompt are kept, not those of
    earlier answers.
    """
    lines = completion.splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), "")
    plain = prompt.messages is None
    if plain and first[:1].isspace():
        body = takewhile(lambda line: not line.strip() or line[:1].isspace(), lines)
        return prompt.text.rpartition(f"\n{_MENDED}\n")[2] + "".join(body)
    fenced = _FENCE.findall(completion)
    code = "\n\n".join(fenced) if fenced else completion
    name = prompt.columns.get("entry_point")
    defined = name is not None and re.search(rf"^\s*(?:async )?def {re.escape(str(name))}\b", code, re.MULTILINE)
    if plain and not fenced and not defined:
        return prompt.text.rpartition(f"\n{_MENDED}\n")[2] + code
    asked = prompt.text if prompt.messages is None else _asked(prompt.messages)
    return "\n".join([*_IMPORT.findall(asked), code])


def _asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """What stands before the first answer of a conversation."""
    before = takewhile(lambda one: one["role"] != "assistant", messages)
    return "\n".join(str(one["content"] or "") for one in before)


def run_answers(prompts: Sequence[Prompt], completions: Sequence[str], config: SandboxConfig) -> list[Outcome | None]:
    """Run the answers' programs with their rows' tests in the sandbox; None where a row has none.

    ConfigError where the machine can't protect itself.
    """
    tests = [row_tests(prompt.columns) for prompt in prompts]
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
