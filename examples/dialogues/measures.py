"""What answers in dialogues are judged by: what the user asked for and was taken up, and what was said before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cagsr.prompts.find_words import find_words
from cagsr.reward.terms.history_repetition import said_before

_TURN = re.compile(r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>|\Z)", re.DOTALL)


def report(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[dict[str, float | None]]:
    """``taken_up``: share of the values in the user's last message that the answer says; ``history_taken_up``: the same of those in
    his messages before; ``said_before``: share of the answer's 3-grams that earlier answers hold; ``echoed``: the same of what
    the user said; ``made_up``: values that nobody said.
    """
    found: list[dict[str, float | None]] = []
    for prompt, text in zip(prompts, completions, strict=True):
        turns = messages_of(prompt)
        users = [content for role, content in turns if role == "user"]
        answers = [content for role, content in turns if role != "user"]
        own = values(text)
        last, earlier = values(users[-1]), set().union(*map(values, users[:-1])) - values(users[-1])
        known = set().union(*(values(content) for _, content in turns))
        found.append(
            {
                "taken_up": share(last, own),
                "history_taken_up": share(earlier, own),
                "said_before": said_before(text, answers, 3),
                "echoed": said_before(text, users, 3),
                "made_up": float(len(own - known)),
            }
        )
    return found


def messages_of(prompt: Any) -> list[tuple[str, str]]:
    """Role and content of each message, of chat messages or of the text that the template of ``prepare`` makes of them."""
    if not isinstance(prompt, str):
        return [(str(one["role"]), str(one["content"])) for one in prompt if isinstance(one, Mapping)]
    found = [(role, content.strip()) for role, content in _TURN.findall(prompt)]
    return [one for one in found if one[1]] or [("user", prompt)]


def values(text: str) -> set[str]:
    """What a message states: numbers, times, and names, which are words with a capital that begin no sentence."""
    begins = {0, *(match.end() for match in re.finditer(r"[.!?]\s+", text))}
    found = set()
    for word in find_words(text):
        plain = text[word.start : word.end]
        named = plain[0].isupper() and word.start not in begins and plain not in ("I", "I'm", "I'd", "I'll", "I've")
        if named or any(letter.isdigit() for letter in plain):
            found.add(word.key)
    return found


def share(wanted: set[str], said: set[str]) -> float | None:
    """The share of some values that are said; None where there is none."""
    return len(wanted & said) / len(wanted) if wanted else None
