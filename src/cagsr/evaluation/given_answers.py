"""Answers that were made before, as ``cagsr generate`` writes them, with the prompts and rows they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import DataError
from cagsr.evaluation.intervals import Floats
from cagsr.flow import EncodedPrompt, Picture, Prompt, Sound
from cagsr.prompts.images import pictures_of
from cagsr.prompts.load import Row, load_rows
from cagsr.prompts.references import contents
from cagsr.prompts.render import messages_of, render_prompt, text_of
from cagsr.prompts.rows import split_texts
from cagsr.prompts.sounds import sounds_of

_RECORDED = ("tokens", "ended")
"""Columns of ``cagsr generate`` that are measures themselves."""
_OWN = ("completion", "completion_ids", *_RECORDED)
"""Columns of an answer's row that are no columns of its prompt."""


@dataclass(frozen=True)
class GivenAnswers:
    """Answers from a file, in the order of the prompts' first mention."""

    prompts: tuple[EncodedPrompt, ...]
    """Without tokens: no model reads them."""
    answers: tuple[tuple[str, ...], ...]
    """One or more to each prompt."""
    recorded: tuple[tuple[tuple[Any, ...], ...], ...]
    """tokens and ended of each of these."""

    @property
    def measures(self) -> dict[str, Floats]:
        """Tokens and ended of every answer where all rows have them, ``(all answers,)``."""
        columns = zip(*(values for own in self.recorded for values in own), strict=True)
        return {
            name: np.array(column, dtype=np.float64)
            for name, column in zip(_RECORDED, columns, strict=True)
            if all(isinstance(value, int | float) for value in column)
        }


def read_answers(path: str, data: DataConfig | None = None, text_columns: Sequence[str] = ()) -> GivenAnswers:
    """Read a file of answers: rows of ``prompt`` and ``completion``, several rows of one prompt being its samples.

    ``data`` is the prompts' own file, for their references and other columns; None: the columns beside the answers.
    ``text_columns`` are text beside the usual ones (``load_rows``). Raises DataError, with file and row, for
    a row without prompt or completion, or whose prompt is not in ``data``.
    """
    asked = {}
    if data is not None:
        asked = {_key(row, data): row for row in reversed(list(split_texts(load_rows(data, text_columns), data)))}
    config = DataConfig(path=path)
    prompts: dict[str, Prompt] = {}
    answers: dict[str, list[str]] = {}
    recorded: dict[str, list[tuple[Any, ...]]] = {}
    for row in load_rows(config, text_columns):
        key, where = _key(row, config), f"{row.source}, row {row.number}"
        if key not in prompts:
            if data is None:
                prompts[key] = _prompt(row, config, leave_out=_OWN)
            elif key in asked:
                prompts[key] = _prompt(asked[key], data)
            else:
                raise DataError(
                    f"{path}, row {row.number}: its prompt is not in {data.path}; give the file that was answered with --data."
                )
        if row.values.get("completion") is None:
            raise DataError(f"{where}: no answer in column 'completion'; give a file as cagsr generate writes it.")
        answers.setdefault(key, []).append(text_of(row.values["completion"], f"{where}: column 'completion'"))
        recorded.setdefault(key, []).append(tuple(row.values.get(name) for name in _RECORDED))
    return GivenAnswers(
        prompts=tuple(EncodedPrompt(prompt, (), (), ()) for prompt in prompts.values()),
        answers=tuple(tuple(answers[key]) for key in prompts),
        recorded=tuple(tuple(recorded[key]) for key in prompts),
    )


def in_order_of(given: GivenAnswers, prompts: Sequence[EncodedPrompt], path: str) -> GivenAnswers:
    """Put answers into the order of another file's prompts. Raises DataError where the two don't answer the same prompts."""
    place = {_prompt_key(encoded.prompt): number for number, encoded in enumerate(given.prompts)}
    missing = next((one.prompt for one in prompts if _prompt_key(one.prompt) not in place), None)
    if missing is not None or len(place) != len(prompts):
        which = f"none for {missing.text[:60]!r}" if missing is not None else "more prompts"
        raise DataError(f"{path}: has {which}; both files must answer the same prompts.")
    order = [place[_prompt_key(one.prompt)] for one in prompts]
    return GivenAnswers(*(tuple(part[n] for n in order) for part in (given.prompts, given.answers, given.recorded)))  # type: ignore[arg-type]


def _prompt(row: Row, config: DataConfig, leave_out: Sequence[str] = ()) -> Prompt:
    values = {name: value for name, value in row.values.items() if name not in leave_out}
    messages = _messages(row, config)
    if messages is not None:
        # No model, so no chat template: the contents as they are.
        columns = {name: entry for name, entry in values.items() if name != config.prompt_column}
        return Prompt(row=row.number, text=contents(messages), messages=messages, columns=columns)
    return render_prompt(row._replace(values=values), config, SalienceConfig(), None)


def _messages(row: Row, config: DataConfig) -> tuple[dict[str, Any], ...] | None:
    """A conversation as ``cagsr generate`` writes it; None for a plain prompt."""
    value = row.values.get(config.prompt_column)
    if not (isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value)):
        return None
    messages = messages_of(value, f"{row.source}, row {row.number}", images=True)
    if config.system_prompt is None or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": config.system_prompt}, *messages)


def _key(row: Row, config: DataConfig) -> str:
    """What makes two rows ask the same: the prompt, its images and its sound, wherever the files stand that name them."""
    value = row.values.get(config.prompt_column)
    messages, where = value if isinstance(value, list) else None, f"{row.source}, row {row.number}"
    media: list[Picture | Sound] = [*pictures_of(row, messages, where), *sounds_of(row, messages, where)]
    asked = _messages(row, config) or value or ""  # a sound may be all there is
    return json.dumps([asked, *(_same(one.source) for one in media)], sort_keys=True, default=str)


def _same(source: Any) -> str:
    if isinstance(source, str):
        return str(Path(source).resolve())
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else str(id(source))


def _prompt_key(prompt: Prompt) -> str:
    asked = prompt.text if prompt.messages is None else prompt.messages
    return json.dumps([asked, prompt.columns.get("images"), prompt.columns.get("audio")], sort_keys=True, default=str)
