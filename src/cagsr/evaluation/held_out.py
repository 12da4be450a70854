"""Held-out prompts: answers sampled and greedy, judged by a metric that shares nothing with the reward."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from cagsr.config import ANSWERS_AT_ONCE, SamplingConfig
from cagsr.errors import CagsrError, ConfigError
from cagsr.evaluation.metrics import lexical_relevance, repetition, rouge_l, word_weights
from cagsr.flow import EncodedPrompt, EpisodeBatch, Prompt
from cagsr.models.load import LoadedModel
from cagsr.prompts.references import REFERENCE_COLUMNS, column_texts, texts_of
from cagsr.rollout.episodes import Player, played
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.support.dotted_path import import_dotted
from cagsr.support.extras import has_extra, install_command
from cagsr.support.processes import broadcast, gather_objects, in_all, split_between_processes
from cagsr.support.progress import each, working
from cagsr.tasks.history import prompt_before


@dataclass(frozen=True)
class HeldOutMetric:
    """A metric with the name it is logged and explained by."""

    name: str
    compute: Callable[..., Sequence[float]]
    """``f(prompts, completions, **columns) -> numbers``, higher is better."""
    notes: tuple[str, ...] = ()
    """What the user should know of the choice."""
    column: str | None = None
    """The column that answers are held against: one whose row has nothing there (the data's user ended the conversation) is not
    judged."""

    def judges(self, prompt: Prompt) -> bool:
        """Whether there is something to hold an answer against."""
        return self.column is None or bool(texts_of(prompt.columns.get(self.column)))


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers to held-out prompts, each answer of a conversation on its own, with what the metric says of each."""

    prompts: tuple[Prompt, ...]
    """What each was an answer to; of a later turn, with all that was said before it."""
    completions: tuple[str, ...]
    metric: tuple[float, ...]
    lengths: tuple[int, ...]  # tokens
    ended: tuple[bool, ...]


def choose_metric(dotted_path: str | None, prompts: Sequence[EncodedPrompt]) -> HeldOutMetric:
    """Pick the held-out metric: the user's, ROUGE-L where there are references (and the extra nltk), else lexical relevance.

    Raises ConfigError for a path that can't be imported, DataError for references of an unknown form.
    """
    if dotted_path is not None:
        return HeldOutMetric(dotted_path, import_dotted(dotted_path, "evaluation.metric"))
    column = next((name for name in REFERENCE_COLUMNS if all(p.prompt.columns.get(name) for p in prompts)), "")
    # Read now, so that a row that can't be used is told before training begins; blank ones are none.
    referenced = bool(column and prompts and all(column_texts([encoded.prompt for encoded in prompts], column)))
    if referenced and has_extra("nltk"):

        def rouge(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
            references = [texts_of(value) for value in columns[column]]
            return [rouge_l(text, own) for text, own in zip(completions, references, strict=True)]

        return HeldOutMetric(f"ROUGE-L against {column}", rouge, column=column)

    weights = word_weights([encoded.prompt.text for encoded in prompts])

    def relevance(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [lexical_relevance(prompt, text, weights) for prompt, text in zip(prompts, completions, strict=True)]

    left_out = f"ROUGE-L against {column} is not measured: {install_command('nltk')}."
    return HeldOutMetric("lexical relevance", relevance, (left_out,) if referenced else ())


def answer(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    metric: HeldOutMetric,
    *,
    seed: int,
    batch_size: int = ANSWERS_AT_ONCE,
    accelerator: Accelerator | None = None,
    player: Player | None = None,
) -> JudgedAnswers:
    """Answer each prompt once and judge the answers; every random generator is left as it was. Raises as ``judge``.

    The same ``seed`` gives the same random numbers, so that two policies are compared under them, ``batch_size`` answers at
    once. ``accelerator`` divides the prompts among its processes, which all call this and get the same; the metric is computed
    by the main one. ``player`` plays a task of several turns, each of whose answers is judged; None: one answer to each prompt.
    """
    mine = split_between_processes(prompts, accelerator)
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + (0 if accelerator is None else accelerator.process_index))
        sample = partial(sample_responses, loaded, sampling=sampling)

        def answers() -> list[tuple[Prompt, str, int, bool]]:
            said: list[tuple[Prompt, str, int, bool]] = []
            for start in each("answering held-out prompts", range(0, len(mine), batch_size), "batches"):
                some = mine[start : start + batch_size]
                said += _answers_of(played(player, sample, some, prompt_batch(loaded, some)))
            return [one for one in said if metric.judges(one[0])]

        found = answers() if player is None else in_all(answers, accelerator)
    everywhere = gather_objects(found, accelerator)
    asked, completions = tuple(one[0] for one in everywhere), tuple(one[1] for one in everywhere)
    values = broadcast(lambda: judge(metric, asked, completions), accelerator)
    lengths, ended = tuple(one[2] for one in everywhere), tuple(one[3] for one in everywhere)
    return JudgedAnswers(asked, completions, values, lengths, ended)


def _answers_of(episodes: EpisodeBatch) -> Iterator[tuple[Prompt, str, int, bool]]:
    """Each answer, with what it was an answer to, its tokens, and whether it ended by itself."""
    lengths, ended, prompts = episodes.lengths.tolist(), episodes.ended.tolist(), episodes.prompts.prompts
    if episodes.context is None:
        yield from zip(prompts, episodes.completions, lengths, ended, strict=True)
        return
    for prompt, episode in zip(prompts, episodes.context.episodes, strict=True):
        said = [segment for segment in episode.segments if segment.sampled]
        for turn, segment in enumerate(said):
            last = turn == len(said) - 1  # an answer that was cut ends its episode
            yield prompt_before(prompt, episode, turn), segment.text, len(segment.ids), episode.ended or not last


@working("judging the answers")
def judge(metric: HeldOutMetric, prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[float, ...]:
    """Apply a metric to one answer for each prompt, its row's columns at hand.

    Raises ConfigError: the metric fails, or gives something other than one finite number for each prompt.
    """

    def numbers(*texts: Sequence[str], **columns: Any) -> Iterable[float]:
        return map(float, metric.compute(*texts, **columns))

    name = f"The metric {metric.name}"
    values = call_checked(numbers, prompts, completions, name, "one number for each", "prompts")
    bad = next((row for row, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        row = prompts[bad].row
        raise ConfigError(f"{name} gave a value that is not a finite number for the prompt of row {row}; mend it.")
    return tuple(values)


def call_checked(
    function: Callable[..., Iterable[Any]],
    rows: Sequence[Prompt],
    completions: Sequence[str],
    name: str,
    returns: str,
    asked: str,
) -> list[Any]:
    """Call a user's ``f(prompts, completions, **columns)`` for as many values; the rows' columns are handed over as lists.

    Raises ConfigError: it raises anything but an error of ours, or gives another number of values. The sentence begins with
    ``name``, and says what f ``returns`` or how many were ``asked``.
    """
    names = {column for prompt in rows for column in prompt.columns} - {"prompts", "completions"}
    columns = {column: [prompt.columns.get(column) for prompt in rows] for column in sorted(names)}
    try:
        values = list(function([prompt.text for prompt in rows], list(completions), **columns))
    except CagsrError:
        raise
    except Exception as error:  # a user's code can raise anything; the cause stays attached
        raise ConfigError(
            f"{name} failed with {type(error).__name__}: {error}; it is called as f(prompts, completions, **columns) and "
            f"returns {returns}."
        ) from error
    if len(values) != len(completions):
        raise ConfigError(f"{name} gave {len(values)} values for {len(completions)} {asked}.")
    return values


def evaluation_metrics(sampled: JudgedAnswers, greedy: JudgedAnswers) -> dict[str, float]:
    """What is logged of an evaluation: sampled at the training temperature, and greedy.

    A policy that only became more peaked gains when sampled and gains nothing greedy, so both are logged.
    """
    return {
        "eval/metric": _mean(sampled.metric),
        "eval/metric_greedy": _mean(greedy.metric),
        "eval/length": _mean(sampled.lengths),
        "eval/repetition": _mean([repetition(text) for text in sampled.completions]),
        "eval/ended": _mean([float(value) for value in sampled.ended]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
