"""Chat templates: a conversation as one text, which characters of it the template wrote, and texts that hold its marks already."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import regex
from jinja2 import TemplateError

from cagsr.errors import DataError
from cagsr.flow import Spoken
from cagsr.prompts.character_ranges import Range

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of a row that its chat template reads: they belong to the prompt, and go where it goes."""


class Place(NamedTuple):
    """Where the content of a message lies in the rendered text, and how many characters were stripped off its front."""

    start: int
    end: int
    skipped: int


Places = tuple[Place | None, ...]
"""One for each text (:func:`texts_in`); None where the template rewrote it so that it can't be found."""


def texts_in(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, str | None]]:
    """The texts of a conversation, each with the number of its message: a content, or the text parts of one that has images.

    None stands for the content of a message that only calls tools.
    """
    return [
        (number, text)
        for number, message in enumerate(messages)
        for text in (
            [part["text"] for part in message["content"] if part["type"] == "text"]
            if isinstance(message["content"], list)
            else [message["content"]]
        )
    ]


def with_texts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> list[dict[str, Any]]:
    """The conversation with other texts, in the order of :func:`texts_in`."""
    following = iter(texts)
    return [
        {
            **message,
            "content": [{**part, "text": next(following)} if part["type"] == "text" else part for part in content]
            if isinstance(content := message["content"], list)
            else next(following),
        }
        for message in messages
    ]


def render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, columns: Mapping[str, Any], where: str
) -> tuple[str, Places]:
    """Apply the tokenizer's chat template to ``messages`` and find each message's content in the text.

    The contents are found by rendering the conversation a second time with placeholders: what stands between the
    placeholders is the template's, and putting the contents back must give the very text. Where it does not (a template that
    rewrites contents), they are searched for in order. Raises DataError without a template, or as :func:`apply_template`.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template; use an "
            "instruction-tuned model, add a chat_template.jinja to the model's folder, or give the prompt as text."
        )
    text = apply_template(messages, tokenizer, columns, where, opened=True)
    return text, _by_placeholders(messages, tokenizer, columns, text) or _by_search(messages, text)


def spoken_in(messages: Sequence[Mapping[str, Any]], places: Places) -> tuple[Spoken, ...]:
    """Where the messages lie that were found, who said them, and how many exchanges ago."""
    ages: list[int] = []
    users = 0
    for message in reversed(messages):
        # An answer is as old as what the user says next, and a system message as what he says first.
        ages.insert(0, max(0, users if message["role"] == "user" else users - 1))
        users += message["role"] == "user"
    return tuple(
        Spoken(place.start, place.end, str(messages[number]["role"]), ages[number])
        for (number, _), place in zip(texts_in(messages), places, strict=True)
        if place is not None
    )


def apply_template(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, columns: Mapping[str, Any], where: str, *, opened: bool
) -> str:
    """The conversation as the tokenizer's chat template writes it, with a row's own ``tools`` and ``chat_template_kwargs``.

    The two go to the template as in TRL, and may be JSON text (a table can't hold them otherwise). ``opened``: with the opening
    of the next answer, or with the assistant's last message left open; else as it stands. DataError, which ``where`` (file and
    row) opens, where the template refuses the conversation, or one of the two columns holds something else.
    """
    continued = opened and messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            _in_form_of(messages, tokenizer),
            tokenize=False,
            add_generation_prompt=opened and not continued,
            continue_final_message=continued,
            **_template_arguments(columns, where),
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the tokenizer's chat template can't render the conversation ({error}).") from error
    return str(text)


def _in_form_of(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Messages as a template takes them: all contents in parts where one has images, or where it reads nothing but parts."""
    in_parts = any(isinstance(message["content"], list) for message in messages)
    if not in_parts and _reads_text(tokenizer, tokenizer.chat_template):
        return [dict(message) for message in messages]
    return [
        {**one, "content": [{"type": "text", "text": one["content"]}]} if isinstance(one["content"], str) else dict(one)
        for one in messages
    ]


@lru_cache(maxsize=8)
def _reads_text(tokenizer: Any, chat_template: Any) -> bool:
    """Whether a chat template reads contents that are text; those of models that see often read parts alone."""
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _HOLDER}], tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError):
        return False
    return _HOLDER in text


def image_mark(tokenizer: Any, placeholder: str) -> str:
    """What a chat template writes for an image that stands before a text; without a template, or where that is not plain, the
    ``placeholder`` alone.
    """
    text = {"type": "text", "text": _HOLDER}
    try:
        with_image, without = (
            str(tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
            for parts in ([{"type": "image"}, text], [text])
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return placeholder
    before, _, after = without.partition(_HOLDER)
    mark = with_image.removeprefix(before).removesuffix(_HOLDER + after)
    return mark if mark.count(placeholder) == 1 and before + mark + _HOLDER + after == with_image else placeholder


def _template_arguments(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row says to the chat template beside its messages: ``tools``, and each of its ``chat_template_kwargs``."""
    tools = _from_json(columns.get("tools"))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{where}: column 'tools' must hold a list of tools as JSON schemas, or JSON text of one.")
    extra = _from_json(columns.get("chat_template_kwargs"))
    if extra and not isinstance(extra, Mapping):
        raise DataError(f"{where}: column 'chat_template_kwargs' must hold an object, or JSON text of one.")
    # Arrow gives every row the keys of all, None where it has none.
    return {"tools": tools or None, **{name: value for name, value in (extra or {}).items() if value is not None}}


def _from_json(value: Any) -> Any:
    """Text as what it says in JSON; text that says nothing in JSON stays text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _by_placeholders(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, columns: Mapping[str, Any], text: str
) -> Places | None:
    # Private-use characters: no template looks for them, no strip() removes them.
    texts = [text for _, text in texts_in(messages)]
    # A message without a content (one that calls tools) stays as it is.
    holders = [None if text is None else f"\ue000{index}\ue001" for index, text in enumerate(texts)]
    try:
        skeleton = apply_template(with_texts(messages, holders), tokenizer, columns, "", opened=True)
    except DataError:
        return None  # the template looks into the contents: search for them instead
    places: list[Place | None] = []
    cursor_skeleton = cursor = 0
    for content, holder in zip(texts, holders, strict=True):
        if content is None or holder is None:
            places.append(None)
            continue
        found = skeleton.find(holder, cursor_skeleton)
        if found < 0:
            return None
        between = skeleton[cursor_skeleton:found]
        if not text.startswith(between, cursor):
            return None
        cursor += len(between)
        stripped = content.strip()
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


def _by_search(messages: Sequence[Mapping[str, Any]], text: str) -> Places:
    places: list[Place | None] = []
    cursor = 0
    for _, said in texts_in(messages):
        content = said or ""
        stripped = content.strip()
        place = None
        for candidate, skipped in ((content, 0), (stripped, len(content) - len(content.lstrip()))):
            if candidate and (found := text.find(candidate, cursor)) >= 0:
                cursor = found + len(candidate)
                place = Place(found, cursor, skipped)
                break
        places.append(place)
    return tuple(places)


_HOLDER = "\ue000"
_CONVERSATIONS = (("user",), ("system", "user"), ("user", "assistant", "user"))


def written_marks(text: str, tokenizer: Any) -> tuple[Range, ...]:
    """Character ranges of a plain prompt that hold special tokens, or what the tokenizer's chat template writes.

    They are no words of the prompt: ``user`` in ``<|im_start|>user`` says nothing that an answer could look at.
    """
    found, _ = _marks(tokenizer, getattr(tokenizer, "chat_template", None))
    return () if found is None else tuple(match.span() for match in found.finditer(text))


def is_rendered(text: str, tokenizer: Any) -> bool:
    """Whether a plain prompt went through a chat template already, or begins with the BOS token as text."""
    found, special = _marks(tokenizer, getattr(tokenizer, "chat_template", None))
    if found is None:
        return False
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return begun or any(match.group() not in special for match in found.finditer(text))


@lru_cache(maxsize=8)
def _marks(tokenizer: Any, chat_template: Any) -> tuple[Any, set[str]]:
    """A pattern of every mark, and the tokenizer's special tokens; None where there is no mark.

    Marks are the template's own words, the special tokens, and a role on the line that one begins. ``chat_template`` is part of
    the key, for one that is replaced.
    """
    if tokenizer is None:
        return None, set()
    special = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
    special = {one for one in (*special, *tokenizer.all_special_tokens) if not one.strip().isalnum() and one.strip()}
    bos = tokenizer.bos_token
    template: set[str] = set()
    for roles in _CONVERSATIONS if chat_template is not None else ():
        messages = [{"role": role, "content": _HOLDER} for role in roles]
        try:
            text = apply_template(messages, tokenizer, {}, "", opened=True)
        except DataError:  # some templates know no system message
            continue
        for piece in text.split(_HOLDER):
            # A file may hold the text without its BOS; a role stands behind a special token.
            heads = [] if not special else regex.findall(r"\L<special>\w+", piece, special=special)
            template |= {piece.strip(), piece.removeprefix(bos or "").strip(), *heads}
    # A template may write plain words ("User: "), which prompts hold too: only what can't be one counts.
    template = {one for one in template - special if any(mark in one for mark in special) or set(one) & set("<[|{")}
    if not template and not special:
        return None, special
    # A base model's tokenizer has no template, but often the tokens of its sibling's: <start_of_turn>user.
    openers = special - {bos, tokenizer.eos_token, tokenizer.pad_token}
    return regex.compile(r"\L<openers>\w+(?=\n)|\L<marks>", openers=openers, marks=template | special), special
