"""``cagsr generate``: answer the prompts of a file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cagsr.commands.inputs import OptionalDataConfig, data_or_prompt, prompt_as_given, read_prompts, write_rows
from cagsr.config import ModelConfig, SamplingConfig
from cagsr.config.ranges import NonNegativeFloat, OutputFile, PositiveInt, Seed
from cagsr.support.progress import say


@dataclass(frozen=True)
class GenerateSampling(SamplingConfig):
    """How answers are sampled."""

    num_generations: PositiveInt = 1
    """Answers per prompt."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits. 0 is greedy."""


@dataclass(frozen=True)
class Config:
    """Answer the prompts of a file, or one prompt."""

    model: ModelConfig
    data: OptionalDataConfig = field(default_factory=OptionalDataConfig)
    prompt: str | None = None
    """One prompt, instead of --data."""
    image: list[str] = field(default_factory=list)
    """Image files that belong to --prompt."""
    audio: str | None = None
    """Sound file that belongs to --prompt (which may be '')."""
    output: OutputFile | None = None
    """JSONL file for the answers; None writes them to standard output."""
    sampling: GenerateSampling = field(default_factory=GenerateSampling)
    keep_columns: bool = False
    """Keep the rows' other columns."""
    token_ids: bool = False
    """Also write the sampled tokens as completion_ids, which score takes as they are."""
    batch_size: PositiveInt = 32
    """Prompts at once."""
    seed: Seed = 0
    """Seeds the sampling."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        yield from data_or_prompt(self.data, self.prompt, self.image, self.audio)


def run(config: Config) -> None:
    """Sample ``num_generations`` answers to each prompt: rows of prompt, completion, tokens and ended."""
    from cagsr.models.generation import generation_notes
    from cagsr.models.load import load_model
    from cagsr.models.stops import endless
    from cagsr.prompts.chat import TEMPLATE_COLUMNS
    from cagsr.rollout.sample_prompts import sample_in_batches

    loaded = load_model(config.model, for_training=False)
    room = config.sampling.max_new_tokens
    prompts, notes = read_prompts(
        config.data, config.prompt, None, None, loaded, room, images=config.image, audio=config.audio
    )
    say(*loaded.notes, *generation_notes(loaded, config.sampling), *notes)
    rows: list[dict[str, Any]] = []
    for some, rollout in sample_in_batches(loaded, prompts, config.sampling, config.seed, config.batch_size):
        for row, text in enumerate(rollout.completions):
            encoded = some[row // config.sampling.num_generations]
            ids = rollout.ids[row][rollout.sampled[row]].tolist()
            columns = encoded.prompt.columns
            kept = {name: columns[name] for name in columns if config.keep_columns or name in TEMPLATE_COLUMNS}
            made: dict[str, Any] = {**prompt_as_given(encoded), "completion": text}
            made |= {"tokens": len(ids), "ended": bool(rollout.ended[row])}
            rows.append({**kept, **made, **({"completion_ids": ids} if config.token_ids else {})})
    say(*endless([one["ended"] for one in rows], config.sampling.max_new_tokens))
    if config.prompt is not None and config.output is None:
        for one in rows:
            print(one["completion"])
        return
    write_rows(rows, config.output)
    where = config.output or "Standard output"
    tokens, ended = (sum(row[name] for row in rows) / len(rows) for name in ("tokens", "ended"))
    done = f"{where}: {len(rows):,} answers to {len(prompts):,} prompts"
    say(f"{done}, {tokens:.1f} tokens on average, {ended:.0%} ended by themselves.")
