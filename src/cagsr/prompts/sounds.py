"""The sound of a row: a column ``audio`` beside the prompt, or a part of a chat message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cagsr.errors import DataError
from cagsr.flow import Sound
from cagsr.prompts.media import folder_of, inside, parts_of, source_of
from cagsr.prompts.rows import Row

AUDIO, SPANS = "audio", "spans"
"""The columns."""
KINDS = ("audio", "audio_url", "input_audio")
"""Types of parts that are sounds: transformers' and OpenAI's."""
_IN_PARTS = ("audio", "path", "url", "audio_url", "input_audio")
_SPANS = TypeAdapter(list[tuple[float, float]])


def sounds_of(row: Row, messages: Sequence[Mapping[str, Any]] | None, where: str) -> tuple[Sound, ...]:
    """The sounds of a row: of its column, else of its messages' parts; of one the regions of its column ``spans``.

    DataError, which ``where`` (file and row) opens, for what can't be a sound or spans.
    """
    value = row.values.get(AUDIO)
    given = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    within = inside(messages, KINDS, _IN_PARTS)
    if given and within:
        raise DataError(f"{where}: has a sound in a column and within its messages; give each sound once.")
    spans = None
    if row.values.get(SPANS) is not None:
        try:
            spans = tuple(_SPANS.validate_python(row.values[SPANS])) or None
        except ValidationError as error:
            raise DataError(
                f"{where}: column '{SPANS}' of a row with a sound must hold spans of it as [[start, end], ...] in seconds."
            ) from error
    folder = folder_of(row)
    return tuple(_sound(one, folder, f"{where}, sound", spans) for one in given or within)


def has_sound(row: Row, messages: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a row has a sound, whatever it is."""
    value = row.values.get(AUDIO)
    return (value is not None and not (isinstance(value, list | str) and not value)) or any(
        parts_of(message.get("content"), KINDS) for message in messages or ()
    )


def _sound(value: Any, folder: Path, name: str, spans: tuple[tuple[float, float], ...] | None) -> Sound:
    if isinstance(value, Mapping) and "data" in value:  # OpenAI's input_audio
        value = f"data:audio/{value.get('format', 'wav')};base64,{value['data']}"
    samples = _samples(value)
    if samples is not None:
        return Sound(samples, name, spans)
    return Sound(
        *source_of(value, folder, name, "a sound", 'samples with their rate {"array", "sampling_rate"}'), spans
    )


def _samples(value: Any) -> tuple[Any, int] | None:
    """Samples with their rate, as datasets gives a decoded sound (an object that is asked like a mapping, or one)."""
    if isinstance(value, Mapping) and value.get("array") is None:
        return None
    if isinstance(value, str | bytes | Path | np.ndarray) or not hasattr(value, "__getitem__"):
        return None
    try:
        return np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
