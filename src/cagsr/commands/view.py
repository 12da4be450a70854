"""``cagsr view``: a page that shows what answers looked at and what each term of the reward gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cagsr.commands.inputs import OptionalDataConfig, about_idf, data_or_prompt, read_prompts
from cagsr.config import AttentionConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.config.ranges import NonNegativeInt, OutputFile, PositiveInt, Seed
from cagsr.errors import ConfigError, DataError
from cagsr.support.extras import require
from cagsr.support.progress import say

if TYPE_CHECKING:
    from cagsr.flow import EncodedPrompt
    from cagsr.models.load import LoadedModel
    from cagsr.scoring.answers import Response


@dataclass(frozen=True)
class Config:
    """Show what the answers to one prompt looked at, as a self-contained HTML page."""

    model: ModelConfig
    data: OptionalDataConfig = field(default_factory=OptionalDataConfig)
    row: PositiveInt = 1
    """Which row of --data, from 1."""
    prompt: str | None = None
    """The prompt, instead of --data."""
    image: list[str] = field(default_factory=list)
    """Image files that belong to --prompt."""
    audio: str | None = None
    """Sound file that belongs to --prompt (which may be '')."""
    answers: NonNegativeInt = 0
    """Sample this many answers."""
    answer: list[str] = field(default_factory=list)
    """The answers themselves, one text or several."""
    response_column: str = "completion"
    """Column of --data with the answer (text or chat messages) or a list of answers; used unless --answers or --answer
    is given."""
    out: OutputFile | None = None
    """HTML file for the page; None: view.html, or no page if only --png is given."""
    png: OutputFile | None = None
    """PNG file for a heat map with the terms as bars."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward_from: str | None = None
    """Folder of a cagsr train run whose reward judges: its settings, IDF table, associations and scales. None: the
    reward given here; IDF and scales over --data and the answers shown."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    seed: Seed = 0
    """Seeds the sampling."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        yield from data_or_prompt(self.data, self.prompt, self.image, self.audio)
        if self.answers and self.answer:
            yield "Give either --answers N to sample or --answer TEXT, not both."
        if self.prompt is not None and not self.answers and not self.answer:
            yield "There are no answers to view: give --answers N to sample some, or --answer TEXT."
        if self.prompt is not None and self.row != 1:
            yield "--row names a row of --data; it can't be used with --prompt."
        if self.data.streaming:
            yield "--data.streaming: a row can't be looked up in a stream; use --data.limit instead."


def run(config: Config) -> None:
    """Write the page, the picture, or both."""
    if config.png is not None:
        require("--png", "pages", modules=["matplotlib"])
    from cagsr.models.generation import generation_notes
    from cagsr.models.load import load_model
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.learn_associations import associations_of
    from cagsr.runs.reward import with_run_reward
    from cagsr.view.viewer import view

    config, learned = with_run_reward(config, config.sampling.temperature)
    learn = config.reward.needs("associations") and config.reward.associations.path is None
    if learn and (config.prompt is not None or not config.answers):
        raise ConfigError(
            "The reward needs associations: name the file of a training run with --reward.associations.path "
            "RUN/associations.json (with --data and --answers they can be learned from the file's prompts)."
        )
    loaded = load_model(config.model, for_training=False)
    frequency = None if learned is None else learned.frequency
    room, columns = config.sampling.max_new_tokens if config.answers else 0, [config.response_column]
    prompts, notes = read_prompts(
        config.data, config.prompt, config.salience, frequency, loaded, room, columns, config.image, config.audio
    )
    prompt = prompts[0] if config.prompt is not None else _row(config, prompts)
    answers: int | Sequence[str | Response]
    answers = config.answers or config.answer or _answers_of(config, loaded, prompt)
    associations = None
    if learn or config.reward.associations.path is not None:
        associations = associations_of(loaded, prompts, config.sampling, config.reward.associations, seed=config.seed)
    if frequency is None and config.prompt is None:  # of one prompt there is nothing to count
        frequency = DocumentFrequency.fit(one.prompt for one in prompts)
    say(*loaded.notes, *(generation_notes(loaded, config.sampling) if config.answers else ()), *notes)
    say(*about_idf(config.salience, config.reward_from))
    try:
        found = view(
            loaded,
            prompt,
            answers,
            reward=config.reward,
            attention=config.attention,
            salience=config.salience,
            associations=associations,
            frequency=frequency,
            scales=None if learned is None else learned.scales,
            sampling=replace(config.sampling, num_generations=max(1, config.answers)),
            seed=config.seed,
        )
    except DataError as error:
        if config.prompt is not None or config.answer:
            raise
        raise DataError(f"{config.data.path}, row {config.row}, column '{config.response_column}': {error}") from error
    out = config.out if config.out is not None or config.png is not None else "view.html"
    if out is not None:
        path = found.save(out)
        say(f"{path}: {path.stat().st_size / 1e6:.2f} MB, open it in a browser.")
    if config.png is not None:
        say(f"{found.save_png(config.png)}: the heat map.")


def _row(config: Config, prompts: Sequence[EncodedPrompt]) -> EncodedPrompt:
    """Find the prompt of ``--row``."""
    for encoded in prompts:
        if encoded.prompt.row == config.row:
            return encoded
    rows = [encoded.prompt.row for encoded in prompts]
    raise DataError(
        f"{config.data.path}: there is no row {config.row} among its {len(rows):,} prompts (rows {min(rows)} to "
        f"{max(rows)}); name another with --row."
    )


def _answers_of(config: Config, loaded: LoadedModel, prompt: EncodedPrompt) -> list[str | Response]:
    """Take the answers from the prompt's own row, as ``cagsr score`` (one) and ``cagsr rank`` (a list) take them."""
    from cagsr.prompts.render import text_of
    from cagsr.scoring.answers import encode_response

    columns = prompt.prompt.columns
    value: Any = columns.get(config.response_column)
    where = f"{config.data.path}, row {config.row}"
    if value is None:
        raise DataError(
            f"{where}: no answer in column '{config.response_column}'; name the column with --response_column, or give "
            "--answers N or --answer TEXT."
        )
    several = isinstance(value, list) and not all(isinstance(one, Mapping) for one in value)
    try:
        texts = [text_of(one) for one in value] if several else [text_of(value)]
    except DataError as error:
        raise DataError(f"{where}: column '{config.response_column}': {error}") from error
    if several:
        return list(texts)
    ids, ended = columns.get("completion_ids"), columns.get("ended") is not False
    return [encode_response(loaded, prompt, texts[0], ended=ended, ids=ids)]
