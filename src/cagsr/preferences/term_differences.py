"""Pairs that somebody judged, as differences of the reward's terms on their scales within prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cagsr.config import SamplingConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt
from cagsr.prompts.render import text_of
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.normalize import Normalizer
from cagsr.reward.values import TermValues
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.scoring.answers import Response, encode_response
from cagsr.support.progress import working

LEFT = ("echo", "length", "history_repetition", "agreement")
"""Their weights stay: a guard, what people's preferences are full of and nobody wants to train, and terms that compare more
than two answers."""


@dataclass(frozen=True)
class TermScales:
    """The scales of the terms that vary among a model's own answers to a prompt."""

    names: tuple[str, ...]
    normalizer: Normalizer
    answers: NDArray[np.float64]
    """``(answers, terms)``: these answers' terms, normalised."""


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs as differences of their terms."""

    differences: NDArray[np.float64]
    """``(pairs, terms)``, normalised, of the better answer less the worse one."""
    prompts: tuple[str, ...]


def term_scales(
    scorer: AnswerScorer, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig, seed: int
) -> TermScales:
    """Sample answers to the prompts and take the terms' deviations within prompts from them."""
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in scorer.weights}
    size = max(1, scorer.micro_batch_size // sampling.num_generations)
    for _, rollout in sample_in_batches(scorer.loaded, prompts, sampling, seed, size):
        for name, value in scorer.values(scorer.batch(rollout)).items():
            raw[name].append(value)
    values = {name: TermValues.of(torch.cat(parts).double()) for name, parts in raw.items()}
    group = torch.arange(len(prompts)).repeat_interleave(sampling.num_generations)
    normalizer = Normalizer(list(values), "within_prompt", scorer.config.clip)
    normalizer.update(values, group)
    names = tuple(name for name in values if name not in LEFT and normalizer.scale(name) > 0)
    columns = [normalizer(name, values[name], group).numpy() for name in names]
    return TermScales(names, normalizer, np.stack(columns, axis=1))


def pair_differences(
    scorer: AnswerScorer, scales: TermScales, pairs: Sequence[EncodedPrompt], columns: tuple[str, str]
) -> JudgedPairs:
    """Score both answers of each pair; ``columns`` hold the better and the worse one.

    DataError for a row without one of them, or with an empty one.
    """
    answers = [_answer(scorer, encoded, column) for encoded in pairs for column in columns]
    with working("scoring the pairs"):
        raw = scorer.raw_values([one for one in pairs for _ in range(2)], answers)
    group = torch.arange(len(pairs)).repeat_interleave(2)
    moved = []
    for name in scales.names:
        better, worse = scales.normalizer(name, TermValues.of(raw[name].double()), group).view(-1, 2).unbind(dim=1)
        moved.append((better - worse).numpy())
    return JudgedPairs(np.stack(moved, axis=1), tuple(one.prompt.text for one in pairs))


def _answer(scorer: AnswerScorer, encoded: EncodedPrompt, column: str) -> Response:
    where = f"row {encoded.prompt.row}"
    if column not in encoded.prompt.columns:
        present = ", ".join(encoded.prompt.columns) or "none"
        raise DataError(f"{where}: no column '{column}' (columns besides the prompt: {present}).")
    text = text_of(encoded.prompt.columns[column], f"{where}, column '{column}'")
    response = encode_response(scorer.loaded, encoded, text)
    if not response.ids:
        raise DataError(f"{where}: the answer in column '{column}' is empty; remove the row or mend it.")
    return response
