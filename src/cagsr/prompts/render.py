"""One row of the data as the text a model reads: columns, marked passages, chat template (TRL's formats)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import StrictInt, TypeAdapter, ValidationError

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import Picture, Prompt
from cagsr.models.hearing import BEFORE, START, Hearing
from cagsr.models.vision import Vision
from cagsr.prompts.character_ranges import Range, cut, not_empty, outside
from cagsr.prompts.chat import Places, image_mark, render_chat, spoken_in, texts_in, with_texts, written_marks
from cagsr.prompts.images import KINDS as IMAGES
from cagsr.prompts.images import has_images, image_parts, pictures_of
from cagsr.prompts.media import parts_of
from cagsr.prompts.rows import Row, content_of
from cagsr.prompts.sounds import KINDS as SOUNDS
from cagsr.prompts.sounds import has_sound, sounds_of

_SPANS = TypeAdapter(tuple[tuple[StrictInt, StrictInt], ...])


def render_prompt(
    row: Row, config: DataConfig, salience: SalienceConfig, tokenizer: Any, vision: Vision | Hearing | None = None
) -> Prompt:
    """Turn a row into a Prompt.

    The prompt column holds text, or a list of chat messages ``{"role", "content"}``; messages go through the
    tokenizer's chat template (with the opening of the answer; a conversation that ends with the assistant is
    continued, as in TRL) and the character ranges the template wrote are noted. All other columns (``completion``,
    ``chosen``, ``rejected``, ``references``, yours) are kept as they are. Passages between ``salience.markers`` lose
    their markers and become spans; spans of ``config.spans_column`` are checked. For a conversation the offsets of
    ``spans_column`` count in the content of the last user message (the last text of it, where there are images), and markers
    may stand in any message.

    Images are those of the column ``images``, or of the messages' parts; ``vision`` reads them. Where a prompt has no
    placeholder for them they stand before it: before the first thing that the user says (as in TRL), or before a plain text, as
    the chat template writes an image (LLaVA's with a new line behind it). A model that hears reads prompts with a sound alone
    (:func:`_with_sound`).

    Raises:
        DataError: the prompt is missing, empty or of a wrong type, a marker has no partner, a span lies outside the
            text, or the tokenizer can't render the conversation. One sentence with file and row.
        ConfigError: markers that are empty, or markers together with a spans column.
    """
    where, values = f"{row.source}, row {row.number}", row.values
    messages = values.get(config.prompt_column)
    sounds = has_sound(row, messages if is_conversation(messages) else None)
    if isinstance(vision, Hearing):
        return _with_sound(row, config, salience, tokenizer, vision, where)
    if sounds and tokenizer is not None:
        raise DataError(
            f"{where}: the prompt has a sound, which nothing reads here: the model does not hear, or this command takes texts; "
            "name a Whisper model (docs/audio.md), or leave the row's sound out."
        )
    if sounds and messages is None:  # it may be all there is
        values = {**values, config.prompt_column: ""}
    if config.prompt_column not in values:
        present = ", ".join(map(str, values)) or "none"
        raise DataError(
            f"{where}: no column '{config.prompt_column}' (columns here: {present}); "
            "name the column that holds the prompt with --data.prompt_column."
        )
    value = values[config.prompt_column]
    columns = {name: entry for name, entry in values.items() if name != config.prompt_column}
    given = _given_spans(values, config, salience, where)
    if isinstance(value, str):
        pictures = _pictures(row, None, tokenizer, vision, where)
        if not value.strip() and not pictures and not (tokenizer is None and (sounds or has_images(row, None))):
            raise _empty(where, config)
        text, marked = _take_markers(value, salience, where)
        if given is not None:
            _check_spans(given, len(text), where)
        before = ""
        if vision is not None and pictures and vision.placeholder not in text:
            before = image_mark(tokenizer, vision.placeholder) * len(pictures)
        text = before + text
        spans = tuple((start + len(before), end + len(before)) for start, end in given or marked)
        template = written_marks(text, tokenizer)
        given_as = value if before else None
        return Prompt(row.number, text, template, spans or None, columns=columns, images=pictures, given=given_as)
    if is_conversation(value):
        pictures = _pictures(row, value, tokenizer, vision, where)
        seen = None if vision is None else pictures
        return _conversation(value, row.number, columns, given, config, salience, tokenizer, seen, where)
    if value is None or value in ([], ()):
        raise _empty(where, config)
    raise DataError(
        f"{where}: column '{config.prompt_column}' holds {_kind(value)}; a prompt is text or a list of chat messages "
        '{"role": ..., "content": ...}.'
    )


def text_of(value: Any, where: str | None = None) -> str:
    """Return the text of a completion or reference column in either of TRL's formats: text, or chat messages.

    Text may also come as the content of a message does, in parts ``{"type": "text", "text": ...}``. DataError, which
    ``where`` (file, row, column) opens, for anything else.
    """
    about = "" if where is None else f"{where}: "
    if isinstance(value, str):
        return value
    if is_parts(value):
        if (text := content_of(value)) is not None:
            return text
        raise DataError(f"{about}A part of it is not text (images are not supported).")
    if isinstance(value, Sequence) and all(isinstance(entry, Mapping) for entry in value):
        spoken = [entry for entry in value if not only_calls(entry)]
        contents = [content_of(entry.get("content")) for entry in spoken]
        if value and not spoken:
            raise DataError(f"{about}The messages only call tools, and there is no text to read.")
        said = [content for content in contents if content is not None]
        if len(said) == len(contents):
            return "\n".join(said)
        raise DataError(f"{about}A message's content is not text (images are not supported).")
    raise DataError(f"{about}Expected text or a list of chat messages, found {_kind(value)}.")


def is_parts(value: Any) -> bool:
    """Whether ``value`` is the content of a message in parts, and not a list of messages or texts."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and "type" in part and part.get("role") is None for part in value)
    )


def is_conversation(value: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _with_sound(
    row: Row, config: DataConfig, salience: SalienceConfig, tokenizer: Any, hearing: Hearing, where: str
) -> Prompt:
    """The prompt of a row with a sound: what opens the transcript, behind the row's own text where it has some.

    That text comes before as Whisper takes one (names that may be said, what was said before); it may also write the opening
    itself, and is then the whole prompt. A conversation must be one message of a user. DataError as :func:`render_prompt`.
    """
    value = row.values.get(config.prompt_column)
    messages = value if is_conversation(value) else None
    _pictures(row, messages, tokenizer, None, where)
    sounds = sounds_of(row, messages, where)
    if len(sounds) != 1:
        has = "no sound" if not sounds else f"{len(sounds)} sounds"
        raise DataError(
            f"{where}: the prompt has {has}, and a model that hears answers one: name its file in the column 'audio'."
        )
    if config.spans_column == "spans":
        raise ConfigError(
            "--data.spans_column spans: of rows with a sound this column holds times; name the column otherwise."
        )
    text, given_as = value, value or ""
    if messages is not None:
        if len(messages) > 1 or messages[0].get("role") != "user":
            raise DataError(
                f"{where}: a model that hears holds no conversation; give one message of a user, with its sound."
            )
        given_as = list(messages_of(messages, where, images=True))
        content = given_as[0]["content"]
        text = content_of(
            [part for part in content if part["type"] == "text"] if isinstance(content, list) else content
        )
    elif value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column '{config.prompt_column}' holds {_kind(value)}; a prompt is text, or nothing.")
    given = _given_spans(row.values, config, salience, where)
    text, marked = _take_markers(text or "", salience, where)
    if given is not None:
        _check_spans(given, len(text), where)
    before = ""
    if START not in text:
        before = f"{BEFORE} " if text.strip() else ""
        text = f"{before}{text.rstrip()}{hearing.opening}"
    spans = tuple((start + len(before), end + len(before)) for start, end in given or marked)
    columns = {name: entry for name, entry in row.values.items() if name != config.prompt_column}
    return Prompt(
        row.number,
        text,
        written_marks(text, tokenizer),
        spans or None,
        columns=columns,
        sounds=sounds,
        given=given_as,
    )


def _conversation(
    value: Sequence[Mapping[str, Any]],
    number: int,
    columns: dict[str, Any],
    given: tuple[Range, ...] | None,
    config: DataConfig,
    salience: SalienceConfig,
    tokenizer: Any,
    seen: tuple[Picture, ...] | None,
    where: str,
) -> Prompt:
    pictures = seen or ()
    written = messages_of(value, where, images=seen is not None)
    messages = _with_images(written, len(pictures), where)
    put_in = len(pictures) > 0 and not any(image_parts(message["content"]) for message in written)
    marked: list[tuple[Range, ...]] = []
    texts: list[str | None] = []
    for _, said in texts_in(messages):
        content, ranges = (None, ()) if said is None else _take_markers(said, salience, where)
        texts.append(content)
        marked.append(ranges)
    messages = with_texts(messages, texts)
    if not pictures and not any((said or "").strip() for said in texts):
        raise _empty(where, config)
    if given is not None:
        owners = [messages[number]["role"] for number, _ in texts_in(messages)]
        last_user = max((index for index, role in enumerate(owners) if role == "user"), default=None)
        if last_user is None:
            raise DataError(f"{where}: spans count in the last user message, but the conversation has none.")
        _check_spans(given, len(texts[last_user] or ""), where)
        marked[last_user] = given
    added = config.system_prompt is not None and messages[0]["role"] != "system"
    if added:
        messages.insert(0, {"role": "system", "content": config.system_prompt or ""})
        marked.insert(0, ())
    text, places = render_chat(messages, tokenizer, columns, where)
    # The system prompt of the config is the same in every prompt: part of the template, never salient.
    contents = [(place.start, place.end) for place in places[int(added) :] if place is not None]
    return Prompt(
        row=number,
        text=text,
        template=outside(len(text), contents),
        spans=_move_spans(marked, places, where),
        messages=tuple(messages),
        spoken=spoken_in(messages[int(added) :], places[int(added) :]),
        columns=columns,
        images=pictures,
        given=[dict(message) for message in written] if put_in else None,
    )


def _pictures(
    row: Row, messages: Sequence[Mapping[str, Any]] | None, tokenizer: Any, vision: Vision | None, where: str
) -> tuple[Picture, ...]:
    """The images of a row; DataError where the model reads text alone. Without a tokenizer nobody is to read them: none."""
    if tokenizer is None:
        return ()
    if vision is not None or not has_images(row, messages):
        return () if vision is None else pictures_of(row, messages, where)
    raise DataError(
        f"{where}: the prompt has images, which nothing reads here: the model reads text alone, has no processor beside it, or "
        "this command takes texts; name a model that sees (docs/images.md), or leave the row's images out."
    )


def _with_images(messages: Sequence[dict[str, Any]], count: int, where: str) -> list[dict[str, Any]]:
    """Put a part for each image before the first thing that the user says, where the messages have none (as TRL does)."""
    if count == 0 or any(image_parts(message["content"]) for message in messages):
        return list(messages)
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError(
            f"{where}: images stand before what the user says, but the conversation has no message of a user."
        )
    parts = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": messages[first]["content"] or ""}]
    return [*messages[:first], {**messages[first], "content": parts}, *messages[first + 1 :]]


def _move_spans(marked: Sequence[tuple[Range, ...]], places: Places, where: str) -> tuple[Range, ...] | None:
    """From offsets in each message's content to offsets in the rendered text; None when nothing is marked."""
    moved = []
    for ranges, place in zip(marked, places, strict=True):
        for start, end in ranges:
            if place is None:
                raise DataError(
                    f"{where}: the chat template changes the message with the marked passage, so that it can't be "
                    "found again; mark plain prompts, or use --salience.weighting idf."
                )
            first = max(place.start, place.start + start - place.skipped)
            last = min(place.end, place.start + end - place.skipped)
            if first < last:
                moved.append((first, last))
    return tuple(moved) or None


def _message(entry: Mapping[str, Any], position: int, where: str, images: bool) -> dict[str, Any]:
    """A message with its content as text, or, with images, as parts; whatever else the template may write (tool calls, a name)
    stays.

    The content of a message that only calls tools is None, as in OpenAI's format: templates ask for that.
    """
    content: str | list[dict[str, Any]] | None = content_of(entry.get("content"))
    if content is None and images and (media := parts_of(entry.get("content"), (*IMAGES, *SOUNDS))):
        parts = entry["content"]
        if all(isinstance(part, Mapping) and (part in media or isinstance(part.get("text"), str)) for part in parts):
            content = [_without_file(part) for part in parts]
    if not isinstance(entry.get("role"), str) or (content is None and not only_calls(entry)):
        raise DataError(
            f"{where}: message {position} needs a role and a content that are text (images are not supported); "
            f"it has {', '.join(f'{name}: {_kind(part)}' for name, part in entry.items()) or 'nothing'}."
        )
    # Arrow gives every message the fields of all, None where it has none.
    return {name: part for name, part in entry.items() if part is not None} | {"content": content}


def _without_file(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message's content as a template takes it: a text, or that an image or a sound stands there."""
    kind = part.get("type")
    if kind in IMAGES or kind in SOUNDS:
        return {"type": "image" if kind in IMAGES else "audio"}
    return {"type": "text", "text": part["text"]}


def only_calls(message: Mapping[str, Any]) -> bool:
    """Whether a message calls tools and says nothing."""
    return message.get("content") is None and bool(message.get("tool_calls") or message.get("function_call"))


def messages_of(value: Sequence[Mapping[str, Any]], where: str, *, images: bool = False) -> tuple[dict[str, Any], ...]:
    """Check chat messages and take their contents as text, without a template; DataError for one without a role or a text.

    ``images``: a content that has some, or a sound, stays a list of parts.
    """
    return tuple(_message(entry, position, where, images) for position, entry in enumerate(value, start=1))


def _take_markers(text: str, salience: SalienceConfig, where: str) -> tuple[str, tuple[Range, ...]]:
    """Remove the pairs of markers from ``text``; returns what is left and the ranges of what stood between them."""
    if salience.markers is None:
        return text, ()
    opening, closing = salience.markers
    if not opening or not closing:
        raise ConfigError("--salience.markers needs two texts that are not empty, as << >>.")
    pairs = list(re.finditer(f"{re.escape(opening)}(.*?){re.escape(closing)}", text, re.DOTALL))
    alone = [pair.start() for pair in pairs if opening != closing and opening in pair[1]]
    alone += [last] if (last := text.find(opening, pairs[-1].end() if pairs else 0)) >= 0 else []
    if alone:
        raise DataError(f"{where}: the marker {opening} at character {alone[0]} has no {closing} of its own; add it.")
    if any(closing in text[start:end] for start, end in outside(len(text), [pair.span() for pair in pairs])):
        raise DataError(f"{where}: a marker {closing} has no {opening} before it; add it or remove this one.")
    cuts = [part for pair in pairs for part in ((pair.start(), pair.start(1)), (pair.end(1), pair.end()))]
    shorter, (ranges,) = cut(text, cuts, [pair.span(1) for pair in pairs])
    return shorter, not_empty(ranges)


def _given_spans(
    row: Mapping[str, Any], config: DataConfig, salience: SalienceConfig, where: str
) -> tuple[Range, ...] | None:
    if config.spans_column is None:
        return None
    if salience.markers is not None:
        raise ConfigError("Give --data.spans_column or --salience.markers, not both.")
    if config.spans_column not in row:
        raise DataError(
            f"{where}: no column '{config.spans_column}' (columns here: {', '.join(map(str, row))}); "
            "name the column that holds the spans with --data.spans_column."
        )
    value = row[config.spans_column]
    try:
        # CSV has no lists.
        return _SPANS.validate_json(value) if isinstance(value, str) else _SPANS.validate_python(value)
    except ValidationError as error:
        raise DataError(
            f"{where}: column '{config.spans_column}' must hold character ranges as [[start, end], ...]; "
            f"it holds {str(value)[:60]!r}."
        ) from error


def _check_spans(spans: Sequence[Range], length: int, where: str) -> None:
    for start, end in spans:
        if not 0 <= start < end <= length:
            raise DataError(
                f"{where}: the span [{start}, {end}] does not lie in the prompt of {length} characters "
                "(0 <= start < end <= length; for a conversation it counts in the last user message)."
            )


def _empty(where: str, config: DataConfig) -> DataError:
    return DataError(f"{where}: the prompt (column '{config.prompt_column}') is empty; write one or remove the row.")


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
