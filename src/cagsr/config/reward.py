"""Settings of the reward: a section for each term, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class CoverageConfig:
    """Saturating coverage: each salient word must be looked at hard once."""

    weight: float = 1.0
    """Weight in the reward; 0 leaves the term out."""
    threshold: float = 0.3
    """Attention at which a word counts as covered (tau)."""
    dense: bool = False
    """Pay each token for the coverage it adds (the gains sum to the coverage) instead of all at the end."""


@dataclass(frozen=True)
class CopyCoverageConfig:
    """Copy coverage: a salient token counts when the response token that looks at it hardest is that token."""

    weight: float = 0.0
    """Weight in the reward; 0 leaves the term out."""


@dataclass(frozen=True)
class GroundedCoverageConfig:
    """Grounded coverage: each salient token must be looked at hard once by the response token that says it."""

    weight: float = 0.0
    """Weight in the reward; 0 leaves the term out."""
    threshold: float = 0.1
    """Attention at which a token counts as covered (tau)."""
    dense: bool = False
    """Pay each token for the coverage it adds instead of all at the end."""


@dataclass(frozen=True)
class AssociatedCoverageConfig:
    """Associated coverage: each prompt word must be answered by a word that, in the model's own answers, goes with it."""

    weight: float = 0.0
    """Weight in the reward; 0 leaves the term out."""


@dataclass(frozen=True)
class UnsupportedConfig:
    """Unsupported: share of the answer's words that go with prompt words which this prompt lacks (invented facts)."""

    weight: float = 0.0
    """Weight in the reward, negative for a penalty; 0 leaves the term out."""


@dataclass(frozen=True)
class AssociationsConfig:
    """Which words go together, learned before the first step from the starting model's own answers (no labels)."""

    path: str | None = None
    """associations.json of an earlier run; None: learn them, if a term with a weight needs them."""
    answers: int = 1024
    """How many answers to sample for it."""
    min_count: int = 5
    """Words that occur in fewer of the prompts or answers have no strength of their own."""
    floor: float = 0.2
    """Weaker associations (phi) count as none."""


@dataclass(frozen=True)
class MeanMassConfig:
    """Mean attention mass on salient words: the paper's literal reading, which pays for short answers."""

    weight: float = 0.0
    """Weight in the reward; 0 leaves the term out."""


@dataclass(frozen=True)
class FocusConfig:
    """Focus: one minus the normalised entropy of the attention over salient words."""

    weight: float = 0.0
    """Weight in the reward; negative pays for spread attention; 0 leaves the term out."""
    entropy_floor: float = 0.0
    """The normalised entropy is clamped from below to this, so that collapse onto one word does not pay."""


@dataclass(frozen=True)
class RepetitionConfig:
    """Repetition: one minus the share of distinct n-grams."""

    weight: float = -0.3
    """Weight in the reward, negative for a penalty; 0 leaves the term out. Repetitions are rare, so that one of them weighs
    heavily once the term is brought to the common scale: small weights do."""
    n: int = 3
    """Length of the n-grams, in tokens."""
    dense: bool = False
    """Charge each repeated n-gram at its last token instead of all at the end."""


@dataclass(frozen=True)
class SelfCertaintyConfig:
    """Self-certainty (Intuitor): mean KL between the uniform and the policy's next-token distribution."""

    weight: float = 0.0
    """Weight in the reward; 0 leaves the term out."""


@dataclass(frozen=True)
class LengthConfig:
    """Length of the answer in tokens, or its distance from a target."""

    weight: float = 0.0
    """Weight in the reward, negative pays for short answers; 0 leaves the term out."""
    target: int | None = None
    """With a target the term is the distance in tokens from it (give a negative weight)."""


@dataclass(frozen=True)
class RewardConfig:
    """The reward: a weighted sum of terms, each brought to one scale first."""

    coverage: CoverageConfig = field(default_factory=CoverageConfig)
    copy_coverage: CopyCoverageConfig = field(default_factory=CopyCoverageConfig)
    grounded_coverage: GroundedCoverageConfig = field(default_factory=GroundedCoverageConfig)
    associated_coverage: AssociatedCoverageConfig = field(default_factory=AssociatedCoverageConfig)
    unsupported: UnsupportedConfig = field(default_factory=UnsupportedConfig)
    associations: AssociationsConfig = field(default_factory=AssociationsConfig)
    mean_mass: MeanMassConfig = field(default_factory=MeanMassConfig)
    focus: FocusConfig = field(default_factory=FocusConfig)
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    self_certainty: SelfCertaintyConfig = field(default_factory=SelfCertaintyConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    functions: list[str] = field(default_factory=list)
    """Your own terms as dotted paths (package.module.function): a RewardTerm, or TRL's
    f(prompts, completions, completion_ids, **columns)."""
    function_weights: list[float] = field(default_factory=list)
    """One weight for each function; empty: 1 each."""
    models: list[str] = field(default_factory=list)
    """Sequence-classification reward models (folder or Hub id) with one output."""
    model_weights: list[float] = field(default_factory=list)
    """One weight for each reward model; empty: 1 each."""
    normalize: Literal["within_prompt", "running", "none"] = "within_prompt"
    """within_prompt: each term is centred on the mean of the prompt's candidates and divided by its standard deviation
    within prompts over the run, so that weights compare what training can follow; running: centred and divided over all
    answers of the run; none: raw values."""
    clip: float = 5.0
    """Normalised terms are clipped to plus or minus this; 0 does not clip."""
