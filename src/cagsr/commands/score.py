"""``cagsr score``: every reward term for prompt-response pairs, as JSONL."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cagsr.commands.inputs import about_idf, answer_scorer, groups_of, prompt_as_given, write_rows
from cagsr.config import AttentionConfig, DataConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.config.ranges import OutputFile, PositiveFloat, PositiveInt
from cagsr.errors import ConfigError, DataError
from cagsr.support.progress import say, working

if TYPE_CHECKING:
    from cagsr.flow import EncodedPrompt, RewardBatch
    from cagsr.models.load import LoadedModel
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.scoring.answers import Response


@dataclass(frozen=True)
class Config:
    """Score prompt-response pairs: all reward terms, raw, and the weighted ones on one scale."""

    model: ModelConfig
    data: DataConfig
    output: OutputFile | None = None
    """JSONL file for the scores; None writes them to standard output."""
    response_column: str = "completion"
    """Column with the response: text, or a list of chat messages."""
    max_response_length: PositiveInt | None = None
    """Cut responses to this many tokens (they then count as unfinished); None never cuts."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward_from: str | None = None
    """Folder of a cagsr train run whose reward judges: its settings, IDF table, associations and scales. None: the
    reward given here; IDF and scales over this file as a whole."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    temperature: PositiveFloat = 1.0
    """Divides the logits for self-certainty, as sampling.temperature does in training."""
    per_token: bool = False
    """Also write each response token with the coverage it adds."""
    per_word: bool = False
    """Also write each salient word with its share of the salience and the best attention it got."""
    batch_size: PositiveInt = 32
    """Pairs in memory at once."""


def run(config: Config) -> None:
    """Score the file; rows with every term, and a summary table on standard error."""
    import torch

    from cagsr.models.load import load_model
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.learn_associations import read_associations
    from cagsr.reward.learn_probe import named_probe
    from cagsr.reward.weigh import weigh
    from cagsr.runs.reward import with_run_reward

    config, learned = with_run_reward(config, config.temperature)
    file = config.reward.associations.path
    if file is None and config.reward.needs("associations"):
        raise ConfigError(
            "The reward needs associations, and score samples no answers to learn them from: name the file of a training run "
            "with --reward.associations.path RUN/associations.json."
        )
    associations = None if file is None else read_associations(Path(file))
    loaded = load_model(config.model, for_training=False)
    frequency = None if learned is None else learned.frequency
    prompts, responses, notes = read_pairs(config, loaded, frequency)
    scorer = answer_scorer(
        config,
        loaded,
        config.temperature,
        micro_batch_size=config.batch_size,
        associations=associations,
        probe=named_probe(config.reward),
        frequency=frequency or DocumentFrequency.fit(one.prompt for one in prompts),
    )
    say(*loaded.notes, *notes)
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in scorer.weights}
    details: list[dict[str, Any]] = []
    with working("scoring", len(prompts), "pairs") as task:
        for batch, values in scorer.score_texts(prompts, responses):
            for name, value in values.items():
                raw[name].append(value)
            start = len(details)
            details += _details(config, loaded, prompts[start : start + config.batch_size], batch)
            task.advance(len(batch.episodes.completions))
    terms = {name: torch.cat(values) for name, values in raw.items()}
    group = torch.tensor(groups_of(prompts))
    weighed = weigh(terms, scorer.weights, config.reward, group, None if learned is None else learned.scales)
    say(weighed.note)
    reward = weighed.total
    rows = [
        {
            "row": encoded.prompt.row,
            **prompt_as_given(encoded),
            "completion": response.text,
            "reward": float(reward[number]),
            "terms": {name: float(values[number]) for name, values in terms.items()},
            "contributions": {name: float(values[number]) for name, values in weighed.contributions.items()},
            "tokens": len(response.ids),
            "ended": response.ended,
            **details[number],
        }
        for number, (encoded, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    write_rows(rows, config.output)
    say(f"{config.output or 'Standard output'}: {len(rows):,} pairs scored.")
    _summary(terms, reward, scorer.weights, [len(response.ids) for response in responses])


@working("reading the pairs")
def read_pairs(
    config: Config, loaded: LoadedModel, frequency: DocumentFrequency | None
) -> tuple[list[EncodedPrompt], list[Response], list[str]]:
    """Read the file's prompts and responses, as tokens that fit the model's context together, and what to say about them.

    Raises DataError for a row without a response, with an empty one, or too long; the message names file and row.
    """
    from cagsr.prompts.load import load_rows
    from cagsr.prompts.prepare import prepare_prompts
    from cagsr.prompts.rows import split_texts
    from cagsr.scoring.answers import encode_response

    rows = split_texts(load_rows(config.data, [config.response_column]), config.data)
    first = next(iter(rows))
    _text(first.values.get(config.response_column), config, f"{first.source}, row {first.number}")
    truncate = config.data.long_prompts == "truncate"
    room = loaded.room_for_prompts(_longest(config, loaded, rows) - 1 if truncate else 0)
    columns = [config.response_column]
    found = prepare_prompts(
        config.data,
        config.salience,
        loaded.tokenizer,
        max_length=room,
        frequency=frequency,
        text_columns=columns,
        vision=loaded.vision,
    )
    context = loaded.pair_context()
    prompts: list[EncodedPrompt] = []
    responses: list[Response] = []
    dropped = cut = 0
    for encoded in found.prompts if found.reopen is None else found.reopen():
        given, where = encoded.prompt.columns, f"{config.data.path}, row {encoded.prompt.row}"
        text = _text(given.get(config.response_column), config, where)
        ids = given.get("completion_ids")
        ended = given.get("ended") is not False
        response = encode_response(loaded, encoded, text, ended=ended, limit=config.max_response_length, ids=ids)
        if not response.ids:
            raise DataError(f"{where}: a response of zero tokens can't be scored; remove the row or mend it.")
        # The last response token is never fed: nothing follows it.
        total = len(encoded.ids) + len(response.ids) - 1
        if context is not None and total > context:
            if config.data.long_prompts == "error":
                raise DataError(
                    f"{where}: prompt and response have {total + 1} tokens, more than the model's context of {context}; "
                    "set --max_response_length, or --data.long_prompts to drop or truncate."
                )
            dropped += 1
            continue
        cut += ended and not response.ended
        prompts.append(encoded)
        responses.append(response)
    if not prompts:
        raise DataError(f"{config.data.path}: no pair fits the model's context; set --data.long_prompts truncate.")
    notes = list(found.notes)
    notes += about_idf(config.salience, config.reward_from)
    if dropped:
        notes.append(f"{dropped:,} pairs are longer than the model's context and were dropped.")
    if cut:
        notes.append(f"{cut:,} responses were cut to {config.max_response_length} tokens and count as unfinished.")
    return prompts, responses, notes


def _longest(config: Config, loaded: LoadedModel, rows: Any) -> int:
    """Tokens of the file's longest response, as far as it will be read, with room for what ends and surrounds it."""
    longest = 1
    for row in rows:
        text = _text(row.values.get(config.response_column), config, f"{row.source}, row {row.number}")
        longest = max(longest, 4 + len(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    return min(longest, config.max_response_length or longest)


def _text(value: Any, config: Config, where: str) -> str:
    from cagsr.prompts.render import text_of

    if value is None:
        hint = ", or cut plain texts in two with --data.split_text 0.5"
        raise DataError(
            f"{where}: no response in column '{config.response_column}'; name the column with --response_column{hint}."
        )
    return text_of(value, f"{where}: column '{config.response_column}'")


def _details(
    config: Config, loaded: LoadedModel, prompts: list[EncodedPrompt], batch: RewardBatch
) -> list[dict[str, Any]]:
    """Give what ``per_token`` and ``per_word`` add to each row."""
    from cagsr.prompts.salience import explain_salience
    from cagsr.reward.terms.coverage import coverage_gains

    assert batch.attention is not None
    rollout, attention = batch.episodes, batch.attention.words
    rows: list[dict[str, Any]] = [{} for _ in prompts]
    mask = rollout.sampled
    if config.per_token:
        gains = coverage_gains(attention, rollout.salience, mask, config.reward.coverage.threshold)
        for number, row in enumerate(rows):
            ids = rollout.ids[number][mask[number]].tolist()
            row["per_token"] = [
                {"token": loaded.tokenizer.decode([token]), "coverage_gain": round(gain, 6)}
                for token, gain in zip(ids, gains[number].tolist(), strict=False)
            ]
    if config.per_word:
        best = attention.masked_fill(~mask[:, :, None], 0.0).amax(dim=1)
        for number, (row, encoded) in enumerate(zip(rows, prompts, strict=True)):
            total = sum(encoded.salience)
            row["per_word"] = [
                {"word": word, "salience": round(weight / total, 6), "attention": round(value, 6)}
                for (word, weight), value in zip(
                    explain_salience(encoded, loaded.tokenizer), best[number].tolist(), strict=False
                )
            ]
    return rows


def _summary(terms: Any, reward: Any, weights: dict[str, float], lengths: list[int]) -> None:
    """Print mean, standard deviation and correlation with length of every term, on standard error."""
    import torch
    from rich.console import Console

    from cagsr.reward.metrics import within_group_correlation
    from cagsr.support.tables import rich_table

    rows = []
    length = torch.tensor(lengths, dtype=torch.float64)
    one = torch.zeros(len(lengths), dtype=torch.int64)
    for name, values in {**terms, "reward": reward}.items():
        known = values[torch.isfinite(values)].double()
        weight = "" if name == "reward" else f"{weights[name]:g}"
        mean = f"{float(known.mean()):.4g}" if len(known) else "-"
        std = f"{float(known.std(correction=0)):.4g}" if len(known) else "-"
        rows.append((name, weight, mean, std, f"{within_group_correlation(values, length, one):+.2f}"))
    header = ("term", "weight", "mean", "std", "corr. with length")
    Console(stderr=True).print(rich_table(f"{len(lengths):,} pairs", header, rows))
