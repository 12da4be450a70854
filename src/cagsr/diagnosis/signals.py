"""Sample answers and read every signal of them once, for all layers and thresholds at the same time.

Each layer is read alone, all of them in one forward; the attention of several layers is the mean of theirs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cagsr.attention import AttentionRegion, PromptAttentionReader, Reading
from cagsr.attention.select import parse_layers
from cagsr.config import AttentionConfig, SamplingConfig
from cagsr.evaluation.intervals import Floats
from cagsr.evaluation.metrics import repetition
from cagsr.flow import Attention, EncodedPrompt, EpisodeBatch, Readings, RewardBatch
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.pooling import pool_pieces
from cagsr.reward.term import ATTENTION, needs_of
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.values import term_values
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.support.progress import working

_Key = TypeVar("_Key")
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Attention at which a word counts as covered, as tried by the diagnosis."""
POOLINGS: tuple[Literal["sum", "max"], ...] = ("sum", "max")
MOST_LAYERS = 12
"""A deeper model is compared at this many layers alone: the first four, where words are looked at before they are mixed, and
others evenly spread; last-N and all stay exact."""


@dataclass(frozen=True)
class Setting:
    """One way to compute the coverage."""

    layers: str
    """As ``attention.layers`` takes it."""
    pooling: str
    threshold: float


@dataclass(frozen=True)
class Signals:
    """What was measured of P prompts with G answers each; all arrays ``(prompts, candidates)`` float64."""

    terms: Mapping[str, Floats]
    """Every reward term, raw, as configured; NaN where it does not apply."""
    coverage: Mapping[Setting, Floats]
    """Saturating coverage for all layer choices, poolings and thresholds."""
    by_layers: Mapping[str, Mapping[str, Floats]]
    """Layer choice -> attention term (copy_coverage, mean_mass, focus) -> values, pooled as configured."""
    configured: Setting
    """The setting that ``terms`` were computed with."""
    length: Floats
    """Tokens."""
    repetition: Floats
    """Repeated word 3-grams of the text."""
    ended: Floats
    """1 where the answer stopped by itself."""
    prompts: tuple[EncodedPrompt, ...] = ()
    completions: tuple[tuple[str, ...], ...] = ()
    truth: Floats | None = None
    """What a checker or a reference metric says, higher is better."""
    truth_name: str = ""


MEASURED = ("terms", "coverage", "by_layers", "length", "repetition", "ended")
"""The fields of ``Signals`` that hold arrays of every answer, in mappings or not."""


def prompts_of(signals: Signals, index: NDArray[np.int64]) -> Signals:
    """The same signals of some of the prompts."""
    return replace(
        signals,
        **{name: _merged([getattr(signals, name)], lambda parts: parts[0][index]) for name in MEASURED},
        prompts=tuple(signals.prompts[number] for number in index),
        completions=tuple(signals.completions[number] for number in index),
        truth=None if signals.truth is None else signals.truth[index],
    )


def _merged(parts: Sequence[Any], make: Callable[[Sequence[Any]], Floats]) -> Any:
    """One array of several, or in mappings of them with the same keys, at any depth, one for each key."""
    if isinstance(parts[0], Mapping):
        return {key: _merged([part[key] for part in parts], make) for key in parts[0]}
    return make(parts)


def layer_choices(available: Sequence[int], configured: str) -> dict[str, tuple[int, ...]]:
    """Name the layer choices that are compared: each layer, last-1 to last-4, all, and the configured one.

    Choices that come to the same layers are listed once, under the name that says most (``all``, ``last-N``, number). Of a
    model with more than ``MOST_LAYERS`` some single layers are left out, evenly, so that the table stays readable. Raises
    ConfigError where the configured layers do not exist.
    """
    names = [configured, "all", *(f"last-{count}" for count in range(1, 5)), *map(str, available)]
    found: dict[tuple[int, ...], str] = {}
    for name in names:
        found.setdefault(parse_layers(name, available), name)
    spread = set(available)
    if len(available) > MOST_LAYERS:
        first, rest = available[:4], available[4:]
        more = MOST_LAYERS - len(first)
        spread = {*first, *(rest[round(i * (len(rest) - 1) / (more - 1))] for i in range(more))}
    always = (configured, "last-1")
    return {name: layers for layers, name in found.items() if len(layers) > 1 or layers[0] in spread or name in always}


class SignalReader:
    """Measures all signals of finished answers: reads every layer that is compared, each alone.

    ``attention`` has the configured layers and heads.
    """

    def __init__(self, loaded: LoadedModel, scorer: AnswerScorer, attention: AttentionConfig) -> None:
        everything = PromptAttentionReader(loaded.model, layers="all", heads=attention.heads)
        self.loaded, self.scorer = loaded, scorer
        self.choices = layer_choices(everything.layers, attention.layers)
        numbers = sorted({number for layers in self.choices.values() for number in layers})
        self.readers = {
            number: PromptAttentionReader(loaded.model, layers=[number], heads=attention.heads) for number in numbers
        }
        self.configured = Setting(attention.layers, scorer.salience.pooling, scorer.config.coverage.threshold)

    def read(self, batches: Iterable[EpisodeBatch], candidates: int) -> Signals:
        """Measure answers, ``candidates`` to each prompt, in the order of the prompts; ``prompts`` are left to the caller."""
        parts: list[dict[str, Any]] = []
        texts: list[str] = []
        for episodes in batches:
            scores = self.scorer.scorer.policy(episodes)
            parts.append(
                _measure(self.loaded, episodes, scores, self.readers, self.choices, self.scorer, self.configured)
            )
            texts += episodes.completions

        def table(values: Sequence[Tensor]) -> Floats:
            return torch.cat([value.cpu().double() for value in values]).view(-1, candidates).numpy()

        rows = tuple(tuple(texts[start : start + candidates]) for start in range(0, len(texts), candidates))
        repeated = np.array([[repetition(text) for text in row] for row in rows])
        return Signals(**_merged(parts, table), configured=self.configured, repetition=repeated, completions=rows)


@working("measuring the terms")
def collect_signals(
    reader: SignalReader, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig, *, seed: int, chunk: int = 8
) -> Signals:
    """Sample ``sampling.num_generations`` answers to each prompt, ``chunk`` prompts at once, and measure all about them.

    The global random generators are left as they were.
    """
    sampled = sample_in_batches(reader.loaded, prompts, sampling, seed, chunk)
    found = reader.read((episodes for _, episodes in sampled), sampling.num_generations)
    return replace(found, prompts=tuple(prompts))


def read_separately(
    loaded: LoadedModel, rollout: EpisodeBatch, readers: Mapping[_Key, Callable[[AttentionRegion], Reading]]
) -> dict[_Key, Tensor]:
    """Read several layers or heads, each alone, in one forward: key -> ``(batch, response, prompt)`` float32."""
    inputs = PassInputs.of(rollout)
    (region,) = loaded.architecture.regions(loaded.model, inputs)
    with torch.no_grad(), loaded.autocast(), ExitStack() as stack:
        readings = {key: stack.enter_context(reader(region)) for key, reader in readers.items()}
        loaded.hidden_states(inputs)
    return {
        key: loaded.architecture.attention(loaded.model, inputs, [reading.attention])
        for key, reading in readings.items()
    }


@working("reading the attention of every layer")
def _measure(
    loaded: LoadedModel,
    rollout: EpisodeBatch,
    scores: Readings,
    readers: Mapping[int, PromptAttentionReader],
    choices: Mapping[str, tuple[int, ...]],
    scorer: AnswerScorer,
    configured: Setting,
) -> dict[str, Any]:
    """All that is ``MEASURED`` but the repetition, of one chunk, flat: ``(sequences,)`` each."""
    layers = read_separately(loaded, rollout, {number: reader.read for number, reader in readers.items()})
    salience, mask = rollout.salience, rollout.sampled
    terms: dict[str, Tensor] = {}
    coverage: dict[Setting, Tensor] = {}
    by_layers: dict[str, dict[str, Tensor]] = {}
    thresholds = sorted({*THRESHOLDS, configured.threshold})
    for name, numbers in choices.items():
        attention = torch.stack([layers[number] for number in numbers]).mean(dim=0)
        for pooling in POOLINGS:
            words = pool_pieces(attention, rollout.words, salience.shape[1], pooling)
            for threshold in thresholds:
                coverage[Setting(name, pooling, threshold)] = saturating_coverage(words, salience, mask, threshold)
            if pooling != configured.pooling:
                continue
            seen = RewardBatch(rollout, scores, scores.logprobs, Attention(attention, words))
            if name == configured.layers:
                terms = scorer.values(seen)
            by_layers[name] = {
                term.name: term_values(term, seen).raw
                for term in scorer.terms
                if ATTENTION in needs_of(term) and term.name != "coverage" and "hidden_likelihood" not in needs_of(term)
            }
    lengths = mask.sum(dim=1)
    return {"terms": terms, "coverage": coverage, "by_layers": by_layers, "length": lengths, "ended": rollout.ended}
