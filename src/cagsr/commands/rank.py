"""``cagsr rank``: best of N by the reward, at inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cagsr.commands import inputs
from cagsr.config import AttentionConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.config.ranges import OutputFile, PositiveInt, Seed
from cagsr.errors import ConfigError, DataError
from cagsr.support.progress import each, say

if TYPE_CHECKING:
    from cagsr.flow import EncodedPrompt
    from cagsr.models.load import LoadedModel
    from cagsr.reward.answers import AnswerScorer
    from cagsr.scoring.answers import Response


@dataclass(frozen=True)
class Config:
    """Sample N answers to each prompt (or take those of the file), and put the best by the reward first."""

    model: ModelConfig
    data: inputs.OptionalDataConfig = field(default_factory=inputs.OptionalDataConfig)
    prompt: str | None = None
    """One prompt, instead of --data; the ranking is then printed."""
    image: list[str] = field(default_factory=list)
    """Image files that belong to --prompt."""
    output: OutputFile | None = None
    """JSONL file for the rankings; None prints that of --prompt, and writes those of --data to standard output."""
    candidates_column: str | None = None
    """Column with the answers to rank, a list of texts; None samples sampling.num_generations answers."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward_from: str | None = None
    """Folder of a cagsr train run whose reward judges: its settings, IDF table, associations and scales. None: the
    reward given here; IDF and scales over these prompts as a whole."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    batch_size: PositiveInt = 8
    """Prompts at once."""
    seed: Seed = 0
    """Seeds the sampling."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        yield from inputs.data_or_prompt(self.data, self.prompt, self.image)
        if self.candidates_column is None and self.sampling.num_generations < 2:
            yield "--sampling.num_generations 1: ranking needs 2 answers or more."
        if self.candidates_column is not None and self.prompt is not None:
            yield "--candidates_column names a column of --data; it can't be used with --prompt."


def run(config: Config) -> None:
    """Rank the answers to each prompt: rows with the best one and all candidates, the best first."""
    import torch

    from cagsr.models.generation import generation_notes
    from cagsr.models.load import load_model
    from cagsr.models.stops import endless
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.learn_associations import associations_of
    from cagsr.reward.learn_probe import named_probe, probe_of
    from cagsr.reward.term import SUPPORT
    from cagsr.reward.weigh import weigh
    from cagsr.runs.reward import with_run_reward

    config, learned = with_run_reward(config, config.sampling.temperature)
    given = config.candidates_column is not None
    if given and config.reward.needs("associations") and config.reward.associations.path is None:
        raise ConfigError(
            "The reward needs associations, and with --candidates_column no answers are sampled to learn them from: name the "
            "file of a training run with --reward.associations.path RUN/associations.json."
        )
    loaded = load_model(config.model, for_training=False)
    frequency = None if learned is None else learned.frequency
    room = 0 if given else config.sampling.max_new_tokens
    columns = [] if config.candidates_column is None else [config.candidates_column]
    prompts, notes = inputs.read_prompts(
        config.data, config.prompt, config.salience, frequency, loaded, room, columns, config.image
    )
    if frequency is None and config.prompt is None:  # of one prompt there is nothing to count
        frequency = DocumentFrequency.fit(one.prompt for one in prompts)
    associations = None
    if config.reward.needs("associations"):
        associations = associations_of(loaded, prompts, config.sampling, config.reward.associations, seed=config.seed)
    probe = named_probe(config.reward)
    if probe is None and not given and frequency is not None and config.reward.needs(SUPPORT):
        probe = probe_of(loaded, prompts, frequency, config.sampling, config.reward.probe, seed=config.seed)
    scorer = inputs.answer_scorer(
        config,
        loaded,
        config.sampling.temperature,
        associations=associations,
        probe=probe,
        frequency=frequency,
    )
    say(*loaded.notes, *([] if given else generation_notes(loaded, config.sampling)), *notes)
    say(*inputs.about_idf(config.salience, config.reward_from))
    candidates = _given if given else _sampled
    answers = list(candidates(config, loaded, scorer, prompts))
    if not given:
        say(*endless([answer["ended"] for _, answer in answers], config.sampling.max_new_tokens))
    own_group = inputs.groups_of(prompts)
    group = torch.tensor([own_group[number] for number, _ in answers])
    raw = {name: torch.tensor([answer["terms"][name] for _, answer in answers]) for name in scorer.weights}
    weighed = weigh(raw, scorer.weights, config.reward, group, None if learned is None else learned.scales)
    say(weighed.note)
    own: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for value, (number, answer) in zip(weighed.total.tolist(), answers, strict=True):
        own[number].append({"completion": answer["completion"], "reward": value, **answer})
    rows = [_ranking(encoded, candidates) for encoded, candidates in zip(prompts, own, strict=True)]
    if config.output is not None or config.prompt is None:
        inputs.write_rows(rows, config.output)
        gap = sum(
            row["reward"] - sum(one["reward"] for one in row["candidates"]) / len(row["candidates"]) for row in rows
        )
        said = f"{config.output or 'Standard output'}: {len(answers):,} answers to {len(rows):,} prompts ranked"
        mean = gap / max(1, len(rows))
        say(f"{said}; the best one's reward is {mean:.2f} above its prompt's mean, on average.")
    if config.prompt is not None:
        _print(rows[0], scorer.weights)


Candidate = tuple[int, dict[str, Any]]
"""Index of the prompt that is answered, and the answer as it is written: completion, raw terms, tokens, ended."""


def _sampled(
    config: Config, loaded: LoadedModel, scorer: AnswerScorer, prompts: Sequence[EncodedPrompt]
) -> Iterator[Candidate]:
    """Yield candidates, sampled for a few prompts at a time."""
    from cagsr.rollout.sample_prompts import sample_in_batches

    start = 0
    for some, rollout in sample_in_batches(loaded, prompts, config.sampling, config.seed, config.batch_size):
        values = scorer.values(scorer.batch(rollout))
        lengths, ended = rollout.lengths.tolist(), rollout.ended.tolist()
        for row, text in enumerate(rollout.completions):
            terms = {name: float(value[row]) for name, value in values.items()}
            answer = {"completion": text, "terms": terms, "tokens": lengths[row], "ended": ended[row]}
            yield start + row // config.sampling.num_generations, answer
        start += len(some)


def _given(
    config: Config, loaded: LoadedModel, scorer: AnswerScorer, prompts: Sequence[EncodedPrompt]
) -> Iterator[Candidate]:
    """Yield each prompt's own candidates, scored."""
    context = loaded.pair_context()
    for number, encoded in enumerate(each("ranking", prompts, "prompts")):
        where = f"{config.data.path}, row {encoded.prompt.row}"
        responses = _responses(config, loaded, encoded, where)
        total = len(encoded.ids) + max(len(response.ids) for response in responses) - 1
        if context is not None and total > context:
            raise DataError(
                f"{where}: prompt and longest candidate have {total + 1} tokens, more than the model's context of "
                f"{context}; shorten them, or cut prompts with --data.max_prompt_length and --data.long_prompts truncate."
            )
        rest = iter(responses)
        for _, values in scorer.score_texts([encoded] * len(responses), responses):
            for row in range(len(next(iter(values.values())))):
                response, terms = next(rest), {name: float(value[row]) for name, value in values.items()}
                tokens = len(response.ids)
                yield number, {"completion": response.text, "terms": terms, "tokens": tokens, "ended": True}


def _responses(config: Config, loaded: LoadedModel, encoded: EncodedPrompt, where: str) -> list[Response]:
    from cagsr.prompts.render import text_of
    from cagsr.scoring.answers import encode_response

    column = config.candidates_column
    value = encoded.prompt.columns.get(column or "")
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(
            f"{where}: column '{column}' must hold a list of two candidate texts or more; name the right column with "
            "--candidates_column, or leave it out to sample answers."
        )
    responses = []
    for place, one in enumerate(value, start=1):
        try:
            response = encode_response(loaded, encoded, text_of(one))
        except DataError as error:
            raise DataError(f"{where}: candidate {place} of column '{column}': {error}") from error
        if not response.ids:
            raise DataError(f"{where}: candidate {place} is a response of zero tokens; remove it or mend it.")
        responses.append(response)
    return responses


def _ranking(encoded: EncodedPrompt, candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One prompt's candidates with their rewards, the best first; equal ones in their order."""
    own = sorted(candidates, key=lambda one: -one["reward"])
    best = {"completion": own[0]["completion"], "reward": own[0]["reward"], "candidates": own}
    return {"row": encoded.prompt.row, **inputs.prompt_as_given(encoded), **best}


def _print(row: dict[str, Any], weights: dict[str, float]) -> None:
    """Show one ranking on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [name for name, weight in weights.items() if weight != 0]
    table = Table(show_lines=True)
    for name in ("reward", *shown, "tokens"):
        table.add_column(name, justify="right")
    table.add_column("answer", overflow="fold", ratio=1)
    for candidate in row["candidates"]:
        tokens = str(candidate["tokens"]) + ("" if candidate["ended"] else " (cut)")
        terms = [f"{candidate['terms'][name]:.3g}" for name in shown]
        table.add_row(f"{candidate['reward']:+.2f}", *terms, tokens, Text(candidate["completion"].strip()))
    Console().print(table)
