"""Preference rows ``{"prompt", "chosen", "rejected"}`` (TRL's format), read as prompts with two answers each; splits by prompt."""

import json
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from cagsr.config import DataConfig, PreferenceConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import Prompt
from cagsr.prompts.load import load_rows
from cagsr.prompts.notes import about_form
from cagsr.prompts.render import is_parts, only_calls, render_prompt, text_of
from cagsr.support.progress import each, working


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, of which somebody or something preferred the first."""

    prompt: Prompt
    chosen: str
    """The better answer as text; a plain one with the white space it has in the file."""
    rejected: str
    """The worse answer."""
    where: str
    """File and row, for messages."""


@working("reading the pairs")
def read_preferences(
    config: PreferenceConfig, tokenizer: Any, path: str | None = None, notes: list[str] | None = None
) -> list[PreferencePair]:
    """Read all pairs of ``config.data``, or of the file ``path`` with the same columns.

    An answer is text, or a list with one message of the assistant; a prompt is text or chat messages, which go through
    the tokenizer's chat template. Pairs of two equal answers, which say nothing, are left out; how many is added to
    ``notes``, with what else is worth saying about the rows. Raises DataError for a row without one of the columns, with an
    empty answer, or in another format; and where the answers of every pair are equal.
    """
    data = config.data if path is None else replace(config.data, path=path)
    pairs: list[PreferencePair] = []
    equal = 0
    for row in load_rows(data, [config.chosen_column, config.rejected_column]):
        where = f"{row.source}, row {row.number}"
        prompt = render_prompt(row, data, SalienceConfig(), tokenizer)
        chosen, rejected = (
            _answer(prompt, getattr(config, name), f"--{name}", where) for name in ("chosen_column", "rejected_column")
        )
        if _equal(chosen, rejected):
            equal += 1
        else:
            pairs.append(PreferencePair(prompt, chosen, rejected, where))
    if not pairs:
        raise DataError(
            f"{data.path}: the chosen and the rejected answer are the same in all {equal:,} pairs; give pairs that differ."
        )
    if notes is not None:
        if equal:
            verb = "pair has two equal answers and was" if equal == 1 else "pairs have two equal answers and were"
            notes.append(f"{equal:,} {verb} left out of {data.path}.")
        notes += about_form([pair.prompt for pair in pairs], tokenizer)
    return pairs


def count_pairs(path: str, chosen_column: str = "chosen", rejected_column: str = "rejected") -> int:
    """How many pairs of a file are trained on: those whose answers differ."""
    count = 0
    for row in load_rows(DataConfig(path=path), [chosen_column, rejected_column]):
        where = f"{row.source}, row {row.number}"
        chosen, rejected = (text_of(row.values.get(column), where) for column in (chosen_column, rejected_column))
        count += not _equal(chosen, rejected)
    return count


def _equal(chosen: str, rejected: str) -> bool:
    """Whether nobody could prefer one: white space is not what is judged."""
    return chosen.split() == rejected.split()


def encode_within_limit(
    pairs: Sequence[PreferencePair],
    encode: Callable[[PreferencePair], dict[str, Any]],
    config: PreferenceConfig,
    limit: int | None,
    measured_in: str | None = None,
) -> list[tuple[PreferencePair, dict[str, Any]]]:
    """Encode pairs and apply the length ``limit`` in tokens as ``config.long_pairs`` says.

    ``encode`` gives a pair's row, with its ``length``. Gives the pairs that are not dropped, each with its row; DataError for
    one that is too long (unless they are dropped), or none left of some. ``measured_in`` is the file of pairs that are only
    measured on, for that message.
    """
    kept = []
    for pair in each("encoding", pairs, "pairs"):
        row = encode(pair)
        if limit is None or row["length"] <= limit:
            kept.append((pair, row))
        elif config.long_pairs == "error":
            raise DataError(
                f"{pair.where}: prompt and answer are {row['length']} tokens long, the limit is {limit}; shorten them, raise "
                "--max_length up to the model's context, or set --long_pairs drop."
            )
    if pairs and not kept:
        if measured_in is None:
            raise DataError(
                f"{config.data.path}: all {len(pairs)} pairs are longer than {limit} tokens and were dropped."
            )
        raise DataError(
            f"{measured_in}: all {len(pairs)} pairs to measure on are longer than {limit} tokens; give shorter ones, or "
            "measure nothing (--held_out 0, no --eval_data)."
        )
    return kept


class OrderByEpoch:
    """Makes a Trainer that groups by length deal its pairs in an order that follows from seed and epoch alone.

    transformers draws that order from the global random numbers, which a training that is resumed within its second epoch
    finds in another state than one that was never stopped.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset, args = trainer.train_dataset if train_dataset is None else train_dataset, trainer.args
        batch, lengths = (
            args.train_batch_size * args.gradient_accumulation_steps,
            list(dataset[args.length_column_name]),
        )

        class EpochSampler(LengthGroupedSampler):
            def __iter__(self) -> Iterator[int]:
                # Asked, not told: on several processes set_epoch does not reach a sampler below the loader that skips batches.
                # The trainer's state is replaced when the training begins, so it is asked for anew each time.
                generator = torch.Generator().manual_seed(args.seed + int(trainer.state.epoch or 0))
                return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))

        return EpochSampler(batch, lengths=lengths)


TRAINER_ARGUMENTS = {
    # Pairs of like length make a batch: a third less to compute, as answers differ much in length.
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    "remove_unused_columns": False,
    "max_length": None,  # encode_within_limit has seen to it
    "disable_dropout": True,
}
"""Arguments of TRL's trainers for what ``encode_within_limit`` gives."""


def _answer(prompt: Prompt, column: str, flag: str, where: str) -> str:
    if column not in prompt.columns:
        present = ", ".join(prompt.columns) or "none"
        raise DataError(
            f"{where}: no column '{column}' (columns besides the prompt: {present}); a preference row has a prompt, a "
            f"chosen and a rejected answer; name the column with {flag}."
        )
    value = prompt.columns[column]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not is_parts(value):
            _check_message(value, prompt, column, where)
        value = text_of(value, f"{where}: column '{column}'")
    if not isinstance(value, str) and value is not None:
        raise DataError(f"{where}: column '{column}' must hold text or a list with one chat message.")
    if not value or not value.strip():
        raise DataError(f"{where}: the answer in column '{column}' is empty; write one or remove the row.")
    return value


def _check_message(value: Sequence[Any], prompt: Prompt, column: str, where: str) -> None:
    if prompt.messages is None:
        raise DataError(f"{where}: the prompt is text, so column '{column}' must be text too.")
    if len(value) != 1 or not isinstance(value[0], Mapping) or value[0].get("role") != "assistant":
        raise DataError(
            f"{where}: column '{column}' must hold one message of the assistant (the earlier messages belong to the prompt)."
        )
    if only_calls(value[0]):
        raise DataError(f"{where}: the answer in column '{column}' only calls tools; preferences are read of texts.")


RowT = TypeVar("RowT")


def prompt_key(row: Any) -> Hashable:
    """What makes two rows pairs of the same prompt: the text or messages of a mapping's ``prompt``, or ``row.prompt.text``."""
    if isinstance(row, Mapping):
        return json.dumps(row["prompt"], sort_keys=True, ensure_ascii=False)
    return str(row.prompt.text)


def split_by_prompt(
    rows: Sequence[RowT], share: float, seed: int, *, key: Callable[[RowT], Hashable] = prompt_key
) -> tuple[list[RowT], list[RowT]]:
    """Split rows so that no prompt is on both sides, ``(training, held out)``; each side keeps the rows' order.

    ``share`` is that of the *prompts* held out, rounded to whole prompts, at least one on each side (ConfigError where there
    is only one); 0 holds none out. ``key`` is what makes two rows the same prompt.
    """
    if share == 0:
        return list(rows), []
    # Sorted, so that the choice depends on which prompts there are and not on the order of the file.
    prompts = sorted({key(row) for row in rows}, key=_order)
    if len(prompts) < 2:
        raise ConfigError(f"--held_out {share:g}: with {len(prompts)} prompt there is nothing to split; set it to 0.")
    count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    chosen = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if key(row) not in chosen], [row for row in rows if key(row) in chosen]


def subset(rows: Sequence[RowT], num_pairs: int | None, seed: int) -> list[RowT]:
    """Draw ``num_pairs`` rows in random order; with one seed a smaller subset is the beginning of a larger one.

    Every row is a label that somebody gave, so pairs are counted and not prompts. None takes all rows.
    """
    if num_pairs is not None and num_pairs > len(rows):
        raise ConfigError(f"--num_pairs {num_pairs}: there are {len(rows)} pairs to train on; give 1 to {len(rows)}.")
    return [rows[index] for index in random.Random(seed).sample(range(len(rows)), len(rows))[:num_pairs]]


def _order(key: Hashable) -> str:
    # Sets print their members in an order that changes from run to run.
    return repr(sorted(map(repr, key)) if isinstance(key, frozenset) else key)
