"""Chat templates: a conversation as one text, and which characters of it the template wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from cagsr.errors import DataError
from cagsr.prompts.ranges import Range, outside


class Place(NamedTuple):
    """Where the content of a message lies in the rendered text."""

    start: int
    end: int
    skipped: int
    """Characters of the content that the template stripped off its front."""


@dataclass(frozen=True)
class Rendered:
    """A conversation after its chat template."""

    text: str
    places: tuple[Place | None, ...]
    """One for each message; None where the template rewrote the content so that it can't be found."""

    def template(self, *, skip_first: bool = False) -> tuple[Range, ...]:
        """Character ranges the template wrote; with ``skip_first`` the first message counts as template too."""
        contents = [place for place in self.places[int(skip_first) :] if place is not None]
        return outside(len(self.text), [(place.start, place.end) for place in contents])


def render_chat(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, columns: Mapping[str, Any], where: str
) -> Rendered:
    """Apply the tokenizer's chat template to ``messages`` and find each message's content in the text.

    Columns ``tools`` and ``chat_template_kwargs`` go to the template, as in TRL. The contents are found by rendering
    the conversation a second time with placeholders: what stands between the placeholders is the template's, and
    putting the contents back must give the very text. Where it does not (a template that rewrites contents), they are
    searched for in order. ``where`` (file and row) opens the messages.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template; use an "
            "instruction-tuned model, add a chat_template.jinja to the model's folder, or give the prompt as text."
        )
    try:
        text = _apply(messages, tokenizer, columns)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the tokenizer's chat template can't render the conversation ({error}).") from error
    return Rendered(text, _by_placeholders(messages, tokenizer, columns, text) or _by_search(messages, text))


def _apply(messages: Sequence[Mapping[str, str]], tokenizer: Any, columns: Mapping[str, Any]) -> str:
    extra = columns.get("chat_template_kwargs")
    continued = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=columns.get("tools") or None,
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        **(extra if isinstance(extra, Mapping) else {}),
    )
    return str(text)


def _by_placeholders(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, columns: Mapping[str, Any], text: str
) -> tuple[Place | None, ...] | None:
    # Private-use characters: no template looks for them, no strip() removes them.
    holders = [f"\ue000{index}\ue001" for index in range(len(messages))]
    try:
        skeleton = _apply(
            [{**message, "content": holder} for message, holder in zip(messages, holders, strict=True)],
            tokenizer,
            columns,
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return None  # the template looks into the contents: search for them instead
    places: list[Place] = []
    cursor_skeleton = cursor = 0
    for message, holder in zip(messages, holders, strict=True):
        found = skeleton.find(holder, cursor_skeleton)
        if found < 0:
            return None
        between = skeleton[cursor_skeleton:found]
        if not text.startswith(between, cursor):
            return None
        cursor += len(between)
        content, stripped = message["content"], message["content"].strip()
        after = skeleton[found + len(holder) : found + len(holder) + 1]
        if text.startswith(content, cursor) and text.startswith(after, cursor + len(content)):
            taken, skipped = content, 0
        elif text.startswith(stripped, cursor):
            taken, skipped = stripped, len(content) - len(content.lstrip())
        else:
            return None
        places.append(Place(cursor, cursor + len(taken), skipped))
        cursor += len(taken)
        cursor_skeleton = found + len(holder)
    return tuple(places) if text[cursor:] == skeleton[cursor_skeleton:] else None


def _by_search(messages: Sequence[Mapping[str, str]], text: str) -> tuple[Place | None, ...]:
    places: list[Place | None] = []
    cursor = 0
    for message in messages:
        content, stripped = message["content"], message["content"].strip()
        place = None
        for candidate, skipped in ((content, 0), (stripped, len(content) - len(content.lstrip()))):
            found = text.find(candidate, cursor) if candidate else -1
            if found >= 0:
                place = Place(found, found + len(candidate), skipped)
                cursor = place.end
                break
        places.append(place)
    return tuple(places)
