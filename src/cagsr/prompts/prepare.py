"""From a data configuration to prompts a model can answer: read, render, weigh the words, encode."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.models.hearing import Hearing
from cagsr.models.sounds import seconds_of
from cagsr.models.vision import Vision
from cagsr.prompts.encode import TextEncoder, Tokens, encode_asked, encode_prompt, truncate_prompt
from cagsr.prompts.find_words import find_words
from cagsr.prompts.load import HEAD_ROWS, Row, Rows, load_rows
from cagsr.prompts.notes import about_messages, describe
from cagsr.prompts.regions import with_regions
from cagsr.prompts.render import render_prompt
from cagsr.prompts.rows import split_texts
from cagsr.prompts.salience import DocumentFrequency, salient_words, words_of_tokens
from cagsr.prompts.stream import PromptSet
from cagsr.prompts.time_regions import with_time_regions
from cagsr.support.progress import working

_Done = tuple[list[tuple[Row, Prompt]], DocumentFrequency, list[tuple[EncodedPrompt | None, bool]]]
FREQUENCY_ROWS = 10_000
"""Rows of a streamed set on which document frequencies are estimated."""


@working("reading the prompts")
def prepare_prompts(
    data: DataConfig,
    salience: SalienceConfig,
    tokenizer: Any,
    *,
    max_length: int,
    frequency: DocumentFrequency | None = None,
    text_columns: Sequence[str] = (),
    vision: Vision | Hearing | None = None,
) -> PromptSet:
    """Read the prompts that ``data`` names and encode them with their salience.

    Args:
        data: where the prompts are, how they are read, what happens to long ones: ``truncate`` leaves out a
            conversation's earliest turns, then the earliest text, never special tokens or the chat template.
        salience: which words matter.
        tokenizer: a fast one.
        max_length: longest prompt in tokens, special tokens included: what the model's context leaves after the
            answer. ``data.max_prompt_length`` lowers it further.
        frequency: document frequencies of an earlier run; None: counted on these prompts (on the first
            ``FREQUENCY_ROWS`` rows when ``data.streaming``).
        text_columns: as ``load_rows`` takes them.
        vision: what reads images, or sounds; None: a prompt with one is refused.

    Raises:
        DataError: a row that can't be used, with file and row; no prompt is left. Of a streamed set rows behind the
            first ``HEAD_ROWS`` are checked when they are read.
        ConfigError: settings that contradict each other.
        ModelError: the tokenizer has no offsets.
    """
    pipeline = _Pipeline(data, salience, TextEncoder(tokenizer), _limit(data, max_length), vision)
    rows = split_texts(load_rows(data, text_columns), data)
    if data.streaming:
        return _prepare_stream(rows, pipeline, frequency)
    located, fitted, results = pipeline.run(rows, frequency)
    encoded = [one for one, _ in results if one is not None]
    long = sum(too_long for _, too_long in results)
    if not encoded:
        raise pipeline.all_dropped(f"all {len(results)}")
    check_numbers([len(one.prompt.images) for one in encoded], vision, data.path)
    asked = {one.prompt.asked for one in encoded}
    different = f" ({len(asked):,} different)" if len(asked) < len(encoded) else ""
    notes = [f"{len(encoded):,} {'prompt' if len(encoded) == 1 else 'prompts'}{different} from {data.path}."]
    if long:
        are, done = (
            ("are", " and were dropped")
            if data.long_prompts == "drop"
            else ("were", "; their earliest turns or text were cut, the end kept")
        )
        heard = f" or {vision.seconds:g} seconds" if isinstance(vision, Hearing) else ""
        than = f"longer than {pipeline.limit:,} tokens{heard}{done} (--data.long_prompts {data.long_prompts})"
        notes.append(f"{long:,} of {len(results):,} prompts {are} {than}.")
    if located[0][0].from_messages:
        notes.append(about_messages(data))
    notes += describe(data, salience, tokenizer, [prompt for _, prompt in located], fitted)
    return PromptSet(encoded, fitted, tuple(notes))


def encode_texts(
    texts: Sequence[str | Sequence[Mapping[str, str]]],
    tokenizer: Any,
    salience: SalienceConfig,
    max_length: int,
    frequency: DocumentFrequency | None = None,
    *,
    source: str = "command line",
    images: Sequence[Sequence[Any]] = (),
    audio: Sequence[Any] = (),
    vision: Vision | Hearing | None = None,
) -> list[EncodedPrompt]:
    """Encode prompts that come from no file: texts, or conversations as lists of chat messages.

    ``frequency`` None: words are counted on ``texts`` themselves. ``source`` is where they come from, for messages; ``images``
    are those of each text, files' paths or PIL images, none where it is empty, and ``audio`` is the sound of each, None where it
    has none; the rest as :func:`prepare_prompts`.
    """
    data = DataConfig(path=source)
    pipeline = _Pipeline(data, salience, TextEncoder(tokenizer), _limit(data, max_length), vision)
    seen = [{"images": list(own)} for own in images] or [{}] * len(texts)
    heard = [{"audio": own} for own in audio] or [{}] * len(texts)
    rows = (
        Row(number, source, {"prompt": text, **of_image, **of_sound})
        for number, (text, of_image, of_sound) in enumerate(zip(texts, seen, heard, strict=True), start=1)
    )
    return [encoded for encoded, _ in pipeline.run(rows, frequency)[2] if encoded is not None]


@dataclass(frozen=True)
class _Pipeline:
    """What happens to one row, with the settings it happens under."""

    data: DataConfig
    salience: SalienceConfig
    encoder: TextEncoder
    limit: int
    vision: Vision | Hearing | None

    def render(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Prompt]]:
        """Yield each row with its prompt."""
        return ((row, self.render_row(row)) for row in rows)

    def run(self, rows: Iterable[Row], frequency: DocumentFrequency | None) -> _Done:
        """All rows, with the document frequencies: those given, or those of the rows."""
        located = list(self.render(rows))
        fitted = frequency or DocumentFrequency.fit(prompt for _, prompt in located)
        return located, fitted, [self.encode(row, prompt, fitted) for row, prompt in located]

    def encode(self, row: Row, prompt: Prompt, frequency: DocumentFrequency) -> tuple[EncodedPrompt | None, bool]:
        """Turn a prompt into tokens and words, and tell whether it was too long; None where it is and such are dropped."""
        where = f"{row.source}, row {row.number}"
        if self._too_long_to_hear(prompt, where):
            return None, True
        prompt, tokens, counts = encode_asked(prompt, self.encoder, self.vision, where)
        too_long = len(tokens.ids) > self.limit
        if too_long and self.data.long_prompts == "error":
            cause = (
                "--data.max_prompt_length"
                if self.limit == self.data.max_prompt_length
                else "what the model's context leaves after --sampling.max_new_tokens"
            )
            raise DataError(
                f"{where}: the prompt has {len(tokens.ids)} tokens, more than the limit of {self.limit} ({cause}); "
                "set --data.long_prompts to drop or truncate, or allow longer prompts."
            )
        if too_long and self.data.long_prompts == "drop":
            return None, True
        if too_long:
            prompt, tokens = truncate_prompt(*self._drop_turns(row, prompt, tokens), self.limit, where)
        if (prompt.images or prompt.sounds) and not any(find_words(prompt.text, prompt.template)):
            encoded = EncodedPrompt(prompt, tokens.ids, (-1,) * len(tokens.ids), ())  # nothing but an image or a sound
        else:
            salient = salient_words(prompt, self.salience, frequency, where)
            encoded = words_of_tokens(prompt, tokens, salient, self.salience, where)
        if isinstance(self.vision, Hearing):
            encoded = with_time_regions(encoded, self.vision, self.salience, where)
        elif prompt.images and self.vision is not None:
            encoded = with_regions(encoded, counts, self.vision, self.salience, where)
        return encoded, too_long

    def _too_long_to_hear(self, prompt: Prompt, where: str) -> bool:
        """Whether a prompt's sound is longer than the model hears, and such prompts are dropped; DataError where they are not."""
        if not isinstance(self.vision, Hearing):
            return False
        seconds = seconds_of(prompt.sounds[0])
        if seconds <= self.vision.seconds:
            return False
        if self.data.long_prompts != "drop":
            raise DataError(
                f"{where}: the sound lasts {seconds:.1f} seconds, and the model hears {self.vision.seconds:g}; a sound is never "
                "cut here: cut it up yourself, or leave such rows out with --data.long_prompts drop."
            )
        return True

    def all_dropped(self, which: str) -> DataError:
        """What is wrong where no prompt is left."""
        heard = f" or {self.vision.seconds:g} seconds" if isinstance(self.vision, Hearing) else ""
        return DataError(
            f"{self.data.path}: {which} prompts are longer than {self.limit} tokens{heard} and were dropped; set "
            "--data.long_prompts truncate or allow longer prompts."
        )

    def _drop_turns(self, row: Row, prompt: Prompt, tokens: Tokens) -> tuple[Prompt, Tokens]:
        """Leave out the earliest turns of a conversation, as few as it takes, the last user message never."""
        if prompt.messages is None or prompt.images:  # an image belongs to a turn
            return prompt, tokens
        messages = list(row.values[self.data.prompt_column])
        first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
        for start in range(first + 1, len(messages)):
            if messages[start]["role"] != "user":  # a conversation must open with the user
                continue
            kept = {**row.values, self.data.prompt_column: messages[:first] + messages[start:]}
            prompt = self.render_row(row._replace(values=kept))
            tokens = encode_prompt(prompt, self.encoder)
            if len(tokens.ids) <= self.limit:
                break
        return prompt, tokens

    def render_row(self, row: Row) -> Prompt:
        return render_prompt(row, self.data, self.salience, self.encoder.tokenizer, self.vision)


def _prepare_stream(rows: Rows, pipeline: _Pipeline, frequency: DocumentFrequency | None) -> PromptSet:
    data = pipeline.data
    notes = [f"Prompts are read from {data.path} as they are needed (--data.streaming)."]
    if frequency is None:
        first = islice(rows, FREQUENCY_ROWS)
        frequency = DocumentFrequency.fit(prompt for _, prompt in pipeline.render(first))
        notes.append(f"IDF is estimated on the {frequency.documents:,} different prompts of the first rows.")
    fitted = frequency

    def reopen() -> Iterator[EncodedPrompt]:
        for row, prompt in pipeline.render(rows):
            encoded, _ = pipeline.encode(row, prompt, fitted)
            if encoded is not None:
                yield encoded

    head = list(islice(reopen(), HEAD_ROWS))
    if not head:
        raise pipeline.all_dropped("all")
    if data.long_prompts != "error":
        done = "dropped" if data.long_prompts == "drop" else "cut at their front"
        notes.append(f"Prompts longer than {pipeline.limit:,} tokens are {done} as they are read, uncounted.")
    if next(iter(rows)).from_messages:
        notes.append(about_messages(data))
    notes += describe(data, pipeline.salience, pipeline.encoder.tokenizer, [one.prompt for one in head], fitted)
    return PromptSet(head, fitted, tuple(notes), reopen)


def check_numbers(images: Iterable[int], vision: Vision | Hearing | None, path: str) -> None:
    """DataError where a model that looks at images by cross-attention has prompts with different numbers of ``images``."""
    counts = sorted(set(images))
    if isinstance(vision, Vision) and vision.states is not None and len(counts) > 1:
        raise DataError(
            f"{path}: the prompts have {' or '.join(map(str, counts))} images, and in a {vision.model_type} model tokens before an "
            "image look at those of the whole batch, so that such prompts would change each other; give all as many."
        )


def _limit(data: DataConfig, max_length: int) -> int:
    """Longest prompt in tokens: the tighter of the context's and the user's limit."""
    if max_length < 1:
        raise ConfigError(
            "The model's context leaves no room for a prompt beside the answer; lower --sampling.max_new_tokens."
        )
    return min(max_length, data.max_prompt_length or max_length)
