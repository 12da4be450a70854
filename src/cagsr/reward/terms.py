"""The built-in terms: the formulas bound to their settings, as :class:`RewardTerm` objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cagsr.config import RewardConfig
from cagsr.errors import RewardError
from cagsr.flow import RewardBatch, Rollout
from cagsr.models.texts import TokenTexts
from cagsr.reward.association import Associations
from cagsr.reward.certainty import mean_certainty
from cagsr.reward.coverage import copy_coverage, coverage_gains, mean_mass, saturating_coverage
from cagsr.reward.focus import focus
from cagsr.reward.grounded import grounded_coverage, grounded_coverage_gains
from cagsr.reward.length import length
from cagsr.reward.protocol import RewardTerm
from cagsr.reward.repetition import repeated_ngrams, repetition, without_stop_token
from cagsr.reward.said import says

ATTENTION_TERMS = frozenset({"coverage", "copy_coverage", "grounded_coverage", "mean_mass", "focus"})
"""Names of the terms that read the prompt attention."""
TEXT_TERMS = frozenset({"copy_coverage", "grounded_coverage"})
"""Those of them that ask whether the answer says what the prompt says, and need to know which tokens say the same."""
ASSOCIATION_TERMS = frozenset({"associated_coverage", "unsupported"})
"""Names of the terms that need associations, learned from the model's own answers."""


@dataclass(frozen=True)
class Coverage:
    """Saturating coverage; see :func:`cagsr.reward.coverage.saturating_coverage`."""

    threshold: float
    dense: bool
    name: str = "coverage"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, or the gains ``(batch, response)`` if dense."""
        return _of_batch(self, batch)

    def read(self, rollout: Rollout, attention: Tensor, word_attention: Tensor) -> Tensor:
        """As a call does, from the maps themselves."""
        formula = coverage_gains if self.dense else saturating_coverage
        return formula(word_attention, rollout.prompts.salience, rollout.response_mask, self.threshold)


@dataclass(frozen=True)
class CopyCoverage:
    """Copy coverage; see :func:`cagsr.reward.coverage.copy_coverage`."""

    texts: TokenTexts | None = field(repr=False, compare=False)
    """What each token says; None: the term can't be read."""
    name: str = "copy_coverage"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return _of_batch(self, batch)

    def read(self, rollout: Rollout, attention: Tensor, word_attention: Tensor) -> Tensor:
        """As a call does, from the maps themselves."""
        return copy_coverage(
            word_attention,
            rollout.prompts.salience,
            _same(self, rollout),
            rollout.response_mask,
            rollout.prompts.words,
        )


@dataclass(frozen=True)
class GroundedCoverage:
    """Grounded coverage; see :func:`cagsr.reward.grounded.grounded_coverage`."""

    threshold: float
    dense: bool
    texts: TokenTexts | None = field(repr=False, compare=False)
    """What each token says; None: the term can't be read."""
    name: str = "grounded_coverage"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, or the gains ``(batch, response)`` if dense."""
        return _of_batch(self, batch)

    def read(self, rollout: Rollout, attention: Tensor, word_attention: Tensor) -> Tensor:
        """As a call does, from the maps themselves."""
        formula = grounded_coverage_gains if self.dense else grounded_coverage
        prompts = rollout.prompts
        return formula(attention, _same(self, rollout), prompts.words, prompts.salience, self.threshold)


@dataclass(frozen=True)
class AssociatedCoverage:
    """Associated coverage; see :meth:`cagsr.reward.association.Associations.coverage`."""

    associations: Associations
    name: str = "associated_coverage"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return _by_text(self.associations.coverage, batch)


@dataclass(frozen=True)
class Unsupported:
    """Unsupported words; see :meth:`cagsr.reward.association.Associations.unsupported`."""

    associations: Associations
    name: str = "unsupported"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return _by_text(self.associations.unsupported, batch)


def _by_text(measure: Callable[[str, str, Sequence[tuple[int, int]]], float], batch: RewardBatch) -> Tensor:
    rollout = batch.rollout
    pairs = zip(rollout.prompts.prompts, rollout.completions, strict=True)
    values = [measure(prompt.text, completion, prompt.template) for prompt, completion in pairs]
    return torch.tensor(values, dtype=torch.float32, device=rollout.response_mask.device)


@dataclass(frozen=True)
class MeanMass:
    """Mean attention mass on salient tokens; see :func:`cagsr.reward.coverage.mean_mass`."""

    name: str = "mean_mass"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return _of_batch(self, batch)

    def read(self, rollout: Rollout, attention: Tensor, word_attention: Tensor) -> Tensor:
        """As a call does, from the maps themselves."""
        return mean_mass(attention, rollout.prompts.words, rollout.response_mask)


@dataclass(frozen=True)
class Focus:
    """Focus; see :func:`cagsr.reward.focus.focus`."""

    entropy_floor: float
    name: str = "focus"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        return _of_batch(self, batch)

    def read(self, rollout: Rollout, attention: Tensor, word_attention: Tensor) -> Tensor:
        """As a call does, from the maps themselves."""
        return focus(word_attention, rollout.prompts.salience, rollout.response_mask, self.entropy_floor)


@dataclass(frozen=True)
class Repetition:
    """N-gram repetition without the stop token; see :func:`cagsr.reward.repetition.repetition`.

    By token id, not by text: an answer that runs in circles says the very same tokens again, while ``Low prices. Low
    ratings`` at the start of two sentences and ``low`` within one are no circle.
    """

    n: int
    dense: bool
    name: str = "repetition"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, or the price of each token ``(batch, response)`` if dense."""
        rollout = batch.rollout
        formula = repeated_ngrams if self.dense else repetition
        return formula(rollout.response_ids, without_stop_token(rollout.response_mask, rollout.ended), self.n)


@dataclass(frozen=True)
class SelfCertainty:
    """Mean self-certainty; see :func:`cagsr.reward.certainty.mean_certainty`."""

    name: str = "self_certainty"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, nats."""
        return mean_certainty(batch.scores.certainty, batch.rollout.response_mask)


@dataclass(frozen=True)
class Length:
    """Length in tokens, or the distance from a target; see :func:`cagsr.reward.length.length`."""

    target: int | None
    name: str = "length"

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``, tokens."""
        return length(batch.rollout.response_mask, self.target)


AttentionTerm = Coverage | CopyCoverage | GroundedCoverage | MeanMass | Focus
"""The terms that read the prompt attention; they look at one answer at a time, so that any part of a batch will do."""
BuiltinTerm = AttentionTerm | AssociatedCoverage | Unsupported | Repetition | SelfCertainty | Length


def _of_batch(term: AttentionTerm, batch: RewardBatch) -> Tensor:
    """The term's value for a batch: worked out already while the attention was read, or from the maps."""
    if term.name in batch.read:
        return batch.read[term.name]
    if batch.attention is None or batch.word_attention is None:
        raise RewardError(f"reward term {term.name!r} reads the prompt attention, but none was captured for this batch")
    return term.read(batch.rollout, batch.attention, batch.word_attention)


def _same(term: CopyCoverage | GroundedCoverage, rollout: Rollout) -> Tensor:
    """``(batch, response, prompt)`` bool: which response tokens say what a salient prompt token says."""
    if term.texts is None:
        raise ValueError(f"{term.name} compares what tokens say: give it the model's texts")
    prompts = rollout.prompts
    return says(term.texts, rollout.response_ids, rollout.response_mask, prompts.ids, prompts.words)


def builtin_terms(
    config: RewardConfig, associations: Associations | None = None, texts: TokenTexts | None = None
) -> list[tuple[RewardTerm, float]]:
    """Every built-in term with its weight, those of weight 0 included (``score`` and ``diagnose`` show them all).

    The terms of ``ASSOCIATION_TERMS`` are there only where ``associations`` are given; those of ``TEXT_TERMS`` can be read
    only where ``texts`` are.
    """
    associated: list[tuple[RewardTerm, float]] = []
    if associations is not None:
        associated = [
            (AssociatedCoverage(associations), config.associated_coverage.weight),
            (Unsupported(associations), config.unsupported.weight),
        ]
    return [
        (Coverage(config.coverage.threshold, config.coverage.dense), config.coverage.weight),
        (CopyCoverage(texts), config.copy_coverage.weight),
        (
            GroundedCoverage(config.grounded_coverage.threshold, config.grounded_coverage.dense, texts),
            config.grounded_coverage.weight,
        ),
        *associated,
        (MeanMass(), config.mean_mass.weight),
        (Focus(config.focus.entropy_floor), config.focus.weight),
        (Repetition(config.repetition.n, config.repetition.dense), config.repetition.weight),
        (SelfCertainty(), config.self_certainty.weight),
        (Length(config.length.target), config.length.weight),
    ]


def needs_associations(config: RewardConfig) -> bool:
    """Whether a term with a weight needs associations."""
    return config.associated_coverage.weight != 0 or config.unsupported.weight != 0
