"""The text that follows a conversation's prompt when it is answered: what a rollout would have had to write."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from cagsr.errors import DataError
from cagsr.flow import Prompt
from cagsr.prompts.chat import apply_template
from cagsr.prompts.render import content_of

_HOLDER = "\ue000answer\ue001"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Where a message has its thoughts beside its content."""
_OPEN_TAG = re.compile(r"<([^<>/\s]+)>\s*\Z")


def answered_messages(prompt: Sequence[Mapping[str, Any]], answer: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The whole conversation: the answer behind the prompt, or as the rest of the message that the prompt begins."""
    # Parts of text are joined, as those of a prompt are.
    contents = [content_of(message.get("content")) for message in answer]
    after = [
        dict(message) if content is None else {**message, "content": content}
        for message, content in zip(answer, contents, strict=True)
    ]
    before = [dict(message) for message in prompt]
    if before and after and before[-1]["role"] == after[0].get("role") == "assistant":
        begun, rest = before.pop(), after[0]
        after[0] = {**begun, **rest, "content": (begun["content"] or "") + (rest.get("content") or "")}
    return [*before, *after]


def text_after(prompt: Prompt, answer: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> str:
    """Give the text that follows ``prompt.text`` when the conversation is answered with the messages ``answer``.

    ``answer`` is one message of the assistant, or several with calls of tools between them. The text is what the chat
    template adds to the prompt. Where the template would write prompt or answer otherwise than a rollout meets them, as R1's
    do, the answer is put behind the prompt of a rollout as it stands, with the end that the template writes: a rollout's
    prompt may open a block (``<think>``) that the template drops from finished turns, and so may the thoughts be dropped that
    the answer holds. An answer without thoughts closes an open block first.

    Raises:
        DataError: the template can't render the conversation, or writes the prompt otherwise before an answer of several
            messages.
    """
    assert prompt.messages is not None
    whole = apply_template(answered_messages(prompt.messages, answer), tokenizer, prompt.columns, where, opened=False)
    kept = whole.startswith(prompt.text)
    rest = whole[len(prompt.text) :] if kept else ""
    content = content_of(answer[0].get("content")) if len(answer) == 1 else None
    if content is None or answer[0].get("tool_calls"):
        if kept:
            return rest
        raise DataError(
            f"{where}: the chat template writes the prompt differently once an answer follows, so an answer of several "
            "messages can't be told apart; use a template that keeps the prompt as it is (see TRL's training chat templates)."
        )
    if kept and "".join(content.split()) in "".join(rest.split()):  # templates strip and add white space
        return rest
    held = answered_messages(prompt.messages, [{**answer[0], "content": _HOLDER}])
    before, _, end = apply_template(held, tokenizer, prompt.columns, where, opened=False).rpartition(_HOLDER)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, prompt.text, strict=False)))
    return _behind(prompt.text[alike:], content, answer[0]) + end


def _behind(begun: str, content: str, message: Mapping[str, Any]) -> str:
    """The content as it goes on from what only a rollout's prompt has: the beginning of the answer."""
    block = _OPEN_TAG.search(begun)
    thoughts = next((message[name] for name in _THOUGHTS if message.get(name)), "")
    if begun.strip() and content.lstrip().startswith(begun.strip()):
        rest = content.lstrip()[len(begun.strip()) :]
        return rest.lstrip() if begun[-1].isspace() else rest
    if block is None or f"</{block[1]}>" in content:
        return content
    return f"{str(thoughts).strip()}\n</{block[1]}>\n\n{content}"
