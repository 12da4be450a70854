"""What answers to the generated tasks are judged by; none of it is in a reward but the verifiable ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cagsr.evaluation.checks import code as run_code
from cagsr.evaluation.checks import reasoning
from examples.generated.tasks import ASK, FACTS


def steps(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[dict[str, float | None]]:
    """Whether the result is right, which share of the equations holds, and which share of the numbers was used."""
    found = reasoning(prompts, completions, **columns)
    return [one | {"used": used(prompt, text)} for one, prompt, text in zip(found, prompts, completions, strict=True)]


def used(prompt: str, text: str) -> float:
    """Share of the prompt's numbers, each as often as it is there, that stand as summands of a line."""
    asked = re.findall(r"\d+", prompt)
    summands = re.findall(r"\d+(?=[+=])", text)
    left = list(summands)
    held = 0
    for number in asked:
        if number in left:
            left.remove(number)
            held += 1
    return held / len(asked)


def code(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[dict[str, float | None]]:
    """Whether the program passes its tests, compiles, and was in time."""
    return run_code(prompts, completions, **columns)


def conversation(
    prompts: Sequence[str], completions: Sequence[str], facts: Sequence[list[str]], **columns: Any
) -> list[dict[str, float]]:
    """Share of the facts of the first turns and of the last one that the summary says, and how many it makes up."""
    found = []
    for text, own in zip(completions, facts, strict=True):
        stated = stated_facts(text)
        asked = [tuple(fact.split(": ", 1)) for fact in own]
        held = [fact in stated for fact in asked]
        early, late = held[: len(held) // 2], held[len(held) // 2 :]
        found.append(
            {
                "said": sum(held) / len(held),
                "said_early": sum(early) / len(early),
                "said_late": sum(late) / len(late),
                "made_up": float(len(stated - set(asked))),
                "again": float(sum(len(list(_said(text, fact))) - 1 for fact in stated)),
            }
        )
    return found


def said(prompts: Sequence[str], completions: Sequence[str], facts: Sequence[list[str]], **columns: Any) -> list[float]:
    """The share of the facts that a summary says, as a metric while training; 1 for the turns before it, which ask for none."""
    judged = conversation(prompts, completions, facts)
    return [
        one["said"] if ASK in prompt[-len(ASK) - 20 :] else 1.0 for prompt, one in zip(prompts, judged, strict=True)
    ]


def told(prompts: Sequence[Any], completions: Sequence[Any], facts: Sequence[list[str]], **columns: Any) -> list[float]:
    """The same less what is made up, as a reward, which gets prompts and answers as lists of messages: the ceiling."""
    judged = conversation([], [_last(answer) for answer in completions], facts)
    return [
        one["said"] - one["made_up"] / 4 if ASK in _last(prompt)[-len(ASK) - 20 :] else 0.0
        for prompt, one in zip(prompts, judged, strict=True)
    ]


def _last(said: str | Sequence[dict[str, Any]]) -> str:
    """A text, or the last of a list of messages."""
    return said if isinstance(said, str) else str(said[-1]["content"])


def stated_facts(text: str) -> set[tuple[str, str]]:
    """The facts that a summary states, as (kind, value)."""
    return {
        (kind, value)
        for kind, (_, phrase, values) in FACTS.items()
        for value in values.split()
        if phrase.format(value) in text
    }


def _said(text: str, fact: tuple[str, str]) -> list[str]:
    return re.findall(re.escape(FACTS[fact[0]][1].format(fact[1])), text)
