"""Prompts in, JSON lines out: what generate, score, rank and diagnose share. Cheap to import, for the help's sake."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cagsr.config import DataConfig, SalienceConfig
from cagsr.support.tables import plain

if TYPE_CHECKING:
    from rich.console import Console

    from cagsr.flow import EncodedPrompt, Picture, Sound
    from cagsr.models.load import LoadedModel
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.answers import AnswerScorer


@dataclass(frozen=True)
class OptionalDataConfig(DataConfig):
    """Where the prompts come from, unless --prompt gives one."""

    path: str = ""
    """JSONL, JSON, CSV or Parquet file, a folder of them, or a Hub dataset id."""


def data_or_prompt(
    data: DataConfig, prompt: str | None, images: Sequence[str], audio: str | None = None
) -> Iterator[str]:
    """Yield a sentence if neither or both of the two were given, or images or a sound without the prompt that they belong to."""
    if images and prompt is None:
        yield "--image belongs to --prompt; the rows of --data name their images in a column 'images'."
    if audio is not None and prompt is None:
        yield "--audio belongs to --prompt, which may be ''; the rows of --data name their sounds in a column 'audio'."
    if (prompt is None) == (data.path == ""):
        yield "Give either --data FILE or --prompt TEXT" + ("." if prompt is None else ", not both.")


def read_prompts(
    data: DataConfig,
    prompt: str | None,
    salience: SalienceConfig | None,
    frequency: DocumentFrequency | None,
    loaded: LoadedModel,
    max_new_tokens: int,
    text_columns: Sequence[str] = (),
    images: Sequence[str] = (),
    audio: str | None = None,
) -> tuple[list[EncodedPrompt], tuple[str, ...]]:
    """Read and encode the prompts of a file, or the one of ``--prompt`` with its ``images`` or ``audio``, with what is worth saying
    about them.

    ``salience`` None: which words matter makes no difference, so all do, and no prompt is refused for its words.
    ``frequency`` is a run's IDF table; None: words are counted in these prompts. ``text_columns`` are text beside the usual
    ones (``load_rows``). Raises ConfigError if no room is left for a prompt, DataError for one that can't be used.
    """
    from cagsr.prompts.prepare import encode_texts, prepare_prompts

    limit = loaded.room_for_prompts(max_new_tokens)
    any_word = salience is None
    salience = salience or SalienceConfig(weighting="uniform", skip_sink=False)
    if prompt is not None:
        return encode_texts(
            [prompt],
            loaded.tokenizer,
            salience,
            limit,
            frequency,
            source="--prompt",
            images=[images],
            audio=[audio],
            vision=loaded.vision,
        ), ()
    found = prepare_prompts(
        data,
        salience,
        loaded.tokenizer,
        max_length=limit,
        frequency=frequency,
        text_columns=text_columns,
        vision=loaded.vision,
    )
    notes = tuple(note for note in found.notes if not any_word or "--salience." not in note)
    return list(found.prompts if found.reopen is None else found.reopen()), notes


def answer_scorer(config: Any, loaded: LoadedModel, temperature: float, **learned: Any) -> AnswerScorer:
    """Who reads the terms, by a command's settings with ``reward``, ``attention``, ``salience``; the rest as ``AnswerScorer``."""
    from cagsr.reward.answers import AnswerScorer

    return AnswerScorer(loaded, config.reward, config.attention, config.salience, temperature=temperature, **learned)


def groups_of(prompts: Sequence[EncodedPrompt]) -> list[int]:
    """Number the prompts, equal ones alike: answers to them are compared with each other, whatever rows they stand in."""
    asked = [(one.ids, one.prompt.asked[1:]) for one in prompts]
    number_of = {key: number for number, key in enumerate(dict.fromkeys(asked))}
    return [number_of[key] for key in asked]


def about_idf(salience: SalienceConfig, reward_from: str | None) -> list[str]:
    """Say where the words were counted, if they were counted here."""
    if salience.weighting != "idf" or reward_from is not None:
        return []
    return ["IDF: counted on the prompts at hand (--reward_from RUN takes a run's)."]


def write_rows(rows: Iterable[Mapping[str, Any]], output: str | None) -> None:
    """Write rows as JSON lines (``plain``): to a file at once, never half of it (else RunError), or to standard output."""
    from cagsr.support.atomic import write_text_atomically

    text = "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text_atomically(Path(output), text)


def prompt_as_given(encoded: EncodedPrompt) -> dict[str, Any]:
    """The prompt as its row has it: column ``prompt`` with text or chat messages, ``images`` and ``audio`` where it has some."""
    prompt = encoded.prompt
    asked = prompt.text if prompt.messages is None else [dict(message) for message in prompt.messages]
    found: dict[str, Any] = {"prompt": asked if prompt.given is None else prompt.given}
    if prompt.images:
        found["images"] = [_image_as_given(one) for one in prompt.images]
    if prompt.sounds:
        found["audio"] = _sound_as_given(prompt.sounds[0])
    return found


def _image_as_given(picture: Picture) -> str:
    """A file's whole path, or the image itself as a data URL."""
    from cagsr.models.pictures import as_data_url

    return str(Path(picture.source).resolve()) if isinstance(picture.source, str) else as_data_url(picture)


def _sound_as_given(sound: Sound) -> str:
    """A file's whole path, or the sound itself as a data URL: a file's bytes as they are, samples as a WAV file."""
    from cagsr.models.sounds import as_data_url

    if isinstance(sound.source, str):
        return str(Path(sound.source).resolve())
    if isinstance(sound.source, bytes):
        return f"data:audio;base64,{base64.b64encode(sound.source).decode('ascii')}"
    samples, rate = sound.source
    return as_data_url(samples, rate)


def table_console() -> Console:
    """Standard output for tables: a file or a pipe has no width of its own, and they need more than the usual 80."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=130)
