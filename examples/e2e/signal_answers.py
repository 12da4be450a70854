"""Answers with everything ``examples.e2e.signals`` reads of them, and what it learns of heads without a label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cagsr.attention.probe import find_attention_layers
from cagsr.config import SamplingConfig
from cagsr.diagnosis.best_of_n import correlation
from cagsr.flow import EncodedPrompt, EpisodeBatch
from cagsr.models.load import LoadedModel
from cagsr.prompts.find_words import find_words
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.pooling import pool_pieces
from cagsr.reward.same_text import says
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.terms.grounded_coverage import grounded_coverage
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.view.measure import Plane, read_planes, token_pieces
from examples.e2e.signal_formulas import (
    Expectation,
    Floats,
    copying_rate,
    expected_by_position,
    head_weights,
    mean_residual,
    probe_weights,
    prompt_mass,
    slope,
)

EXPECTATIONS: tuple[Expectation, ...] = ("mean", "linear", "log")
SINKLESS = "mean, without the sink"


@dataclass(frozen=True)
class Chunk:
    """Some prompts' answers with the attention of every head."""

    rollout: EpisodeBatch
    logprobs: Tensor  # (batch, response)
    heads: Tensor  # (heads, batch, response, prompt) float32
    words: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    """For each answer its words in order: what they are, and the tokens they are made of."""

    @property
    def usable(self) -> Tensor:
        """``(batch, prompt)`` bool: prompt tokens but padding and the first one, the attention sink."""
        mask = self.rollout.prompts.real
        return mask & (mask.cumsum(dim=1) > 1)

    @property
    def sink(self) -> Tensor:
        """``(batch,)`` int64: the first prompt token."""
        return self.rollout.prompts.real.int().argmax(dim=1)


@dataclass(frozen=True)
class Answers:
    """The answers of one model to some prompts."""

    prompts: tuple[EncodedPrompt, ...]
    candidates: int
    chunks: tuple[Chunk, ...]
    terms: Mapping[str, Floats]
    """The library's reward terms, ``(prompts, candidates)`` each."""
    planes: tuple[Plane, ...]
    """Layer and number of each head."""

    def grid(self, parts: Sequence[Tensor]) -> Floats:
        """Put ``(..., batch)`` values of all chunks into ``(..., prompts, candidates)`` float64."""
        values: Floats = torch.cat([part.double() for part in parts], dim=-1).numpy()
        return values.reshape(*values.shape[:-1], len(self.prompts), self.candidates)

    def texts(self) -> list[list[str]]:
        """The answers, a list for each prompt."""
        flat = [text for chunk in self.chunks for text in chunk.rollout.completions]
        return [flat[start : start + self.candidates] for start in range(0, len(flat), self.candidates)]

    def said(self) -> list[list[list[str]]]:
        """The words of each answer, a list of answers for each prompt."""
        flat = [[key for key, _ in words] for chunk in self.chunks for words in chunk.words]
        return [flat[start : start + self.candidates] for start in range(0, len(flat), self.candidates)]


@torch.no_grad()
def read_answers(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    scorer: AnswerScorer,
    seed: int,
    batch: int,
) -> Answers:
    """Sample answers, and read all reward terms and the attention of every head of every layer.

    Args:
        loaded: a decoder-only model.
        prompts: what is asked.
        sampling: how.
        scorer: the library's terms.
        seed: of the sampling.
        batch: prompts at once.
    """
    found = find_attention_layers(loaded.model)
    planes = tuple(Plane(layer.number, head) for layer in found.layers for head in range(layer.heads))
    chunks, terms = [], []
    for _, rollout in sample_in_batches(loaded, prompts, sampling, seed, batch):
        scored = scorer.batch(rollout)
        terms.append(scorer.values(scored))
        read = read_planes(loaded, rollout, found, planes)
        heads = torch.stack([read[plane] for plane in planes]) * rollout.sampled[None, :, :, None]
        words = tuple(
            words_of(token_pieces(loaded.tokenizer, ids[mask].tolist()), text)
            for ids, mask, text in zip(rollout.ids, rollout.sampled, rollout.completions, strict=True)
        )
        chunks.append(Chunk(rollout, scored.readings.logprobs.float(), heads, words))
    answers = Answers(tuple(prompts), sampling.num_generations, tuple(chunks), {}, planes)
    columns = {name: answers.grid([part[name] for part in terms]) for name in terms[0]}
    return Answers(answers.prompts, answers.candidates, answers.chunks, columns, planes)


def words_of(pieces: Sequence[str], text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Find the words of an answer and the tokens each is made of; words of special tokens behind the text are left out.

    Args:
        pieces: the text of each token, the joined pieces starting with the answer's text up to white space before it.
        text: the answer.
    """
    joined = "".join(pieces)
    start = joined.find(text.strip())
    end = start + len(text.strip()) if start >= 0 else len(joined)
    ends = np.cumsum([len(piece) for piece in pieces])
    found = []
    for word in find_words(joined[:end]):
        first, last = np.searchsorted(ends, [word.start, word.end - 1], side="right")
        found.append((word.key, tuple(range(int(first), int(last) + 1))))
    return tuple(found)


@dataclass(frozen=True)
class Calibration:
    """What was learned of a model from unlabelled answers to other prompts than those measured."""

    copying: Tensor
    """``(heads,)`` how often the head's hardest look is at the token being said."""
    coverage_agreement: Tensor
    """``(heads,)`` within-prompt correlation of the head's coverage with associated_coverage."""
    grounded_agreement: Tensor
    """``(heads,)`` the same of its grounded coverage."""
    expected: Mapping[str, Tensor]
    """Lookback by position, ``(heads, positions)``, for each way to expect it."""
    probe: Floats
    """``(heads,)`` weights of the lookback residuals that predict minus ``unsupported`` best."""
    probe_slope: float
    """What the probed lookback gains with a token of length, within prompts."""
    content: Mapping[str, float]
    """Content words with their inverse document frequency among the answers."""
    common: frozenset[str]
    """The other words."""


def calibrate(answers: Answers, scorer: AnswerScorer, positions: int, common_share: float) -> Calibration:
    """Learn from unlabelled answers: which heads copy or agree with the associations, and what lookback to expect where.

    Args:
        answers: to calibration prompts.
        scorer: the settings of the terms.
        positions: the longest answer that will be measured, in tokens.
        common_share: words that more than this share of the answers say are no content words.
    """
    ids = scorer.loaded.texts.ids
    rates = [
        copying_rate(chunk.heads, ids[r.ids], r.sampled, ids[r.prompts.ids], chunk.usable)
        for chunk, r in ((chunk, chunk.rollout) for chunk in answers.chunks)
    ]
    target = answers.terms["associated_coverage"]
    agreement = {
        kind: torch.tensor([correlation(values, target) for values in values_of_heads(answers, scorer, kind)])
        for kind in ("coverage", "grounded_coverage")
    }
    mask = _joined([chunk.rollout.sampled for chunk in answers.chunks])
    mass = _joined([prompt_mass(chunk.heads, chunk.rollout.sampled) for chunk in answers.chunks])
    bare = _joined([prompt_mass(chunk.heads, chunk.rollout.sampled, chunk.sink) for chunk in answers.chunks])
    expected: dict[str, Tensor] = {how: expected_by_position(mass, mask, how, positions) for how in EXPECTATIONS}
    expected[SINKLESS] = expected_by_position(bare, mask, "mean", positions)
    residual = lookback(answers, expected)["mean"]
    probe = probe_weights(residual, -answers.terms["unsupported"])
    counts = Counter(word for some in answers.said() for words in some for word in set(words))
    total = len(answers.prompts) * answers.candidates
    common = frozenset(word for word, count in counts.items() if count > common_share * total)
    return Calibration(
        copying=torch.stack(rates).mean(dim=0),
        coverage_agreement=agreement["coverage"],
        grounded_agreement=agreement["grounded_coverage"],
        expected=expected,
        probe=probe,
        probe_slope=slope(np.tensordot(probe, residual, axes=1), answers.terms["length"]),
        content={word: math.log((total + 1) / count) for word, count in counts.items() if word not in common},
        common=common,
    )


def lookback(answers: Answers, expected: Mapping[str, Tensor]) -> dict[str, Floats]:
    """Mean lookback above what is expected at its position, ``(heads, prompts, candidates)`` for each expectation."""
    found = {}
    for name, table in expected.items():
        parts = []
        for chunk in answers.chunks:
            mask = chunk.rollout.sampled
            mass = prompt_mass(chunk.heads, mask, chunk.sink if name == SINKLESS else None)
            parts.append(mean_residual(mass, mask, table))
        found[name] = answers.grid(parts)
    return found


def values_of_heads(answers: Answers, scorer: AnswerScorer, kind: str) -> Floats:
    """Coverage or grounded coverage of every head alone, ``(heads, prompts, candidates)``."""
    count = len(answers.planes)
    return np.stack([weighted_heads(answers, scorer, kind, torch.eye(count)[head]) for head in range(count)])


def weighted_heads(answers: Answers, scorer: AnswerScorer, kind: str, weights: Tensor) -> Floats:
    """Coverage or grounded coverage from the weighted mean of the heads' attention, ``(prompts, candidates)``."""
    parts = []
    for chunk, attention in mixed(answers, weights):
        r = chunk.rollout
        salience, mask = r.prompts.salience, r.sampled
        if kind == "coverage":
            words = pool_pieces(attention, r.prompts.words, salience.shape[1], scorer.salience.pooling)
            parts.append(saturating_coverage(words, salience, mask, scorer.config.coverage.threshold))
        else:
            same = says(scorer.loaded.texts, r.ids, mask, r.prompts.ids, r.prompts.words)
            threshold = scorer.config.grounded_coverage.threshold
            parts.append(grounded_coverage(attention, same, r.prompts.words, salience, threshold))
    return answers.grid(parts)


def mixed(answers: Answers, weights: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with the weighted mean of its heads' attention, ``(batch, response, prompt)``; weights sum to 1."""
    for chunk in answers.chunks:
        yield chunk, torch.einsum("h,hbtp->btp", weights.float(), chunk.heads)


def best_weights(scores: Tensor) -> Tensor:
    """All weight on the head with the largest score, ``(heads,)``."""
    return head_weights((scores == scores.max()).double())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put ``(..., batch, response)`` tensors of different lengths together, padded with zeros."""
    longest = max(part.shape[-1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts]
    return torch.cat(padded, dim=-2)
