"""Settings of the reward: a section for each registered term, and how they are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cagsr.config.ranges import NonNegativeFloat, PositiveInt, PositiveShare
from cagsr.reward.registry import registered_terms
from cagsr.support.dotted_path import import_dotted

TERMS = registered_terms()
"""The terms that have a section; one that is registered later is named in ``reward.functions``."""


@dataclass(frozen=True)
class AssociationsConfig:
    """Which words go together, learned before the first step from the starting model's own answers (no labels)."""

    path: str | None = None
    """associations.json of an earlier run; None: learn them, if a term with a weight needs them."""
    answers: PositiveInt = 1024
    """How many answers to sample for it."""
    min_count: PositiveInt = 5
    """Words that occur in fewer of the prompts or answers have no strength of their own."""
    floor: PositiveShare = 0.2
    """Weaker associations (phi) count as none."""


@dataclass(frozen=True)
class ProbeConfig:
    """The grounding probe, learned before the first step from the starting model's own answers (no labels)."""

    path: str | None = None
    """grounding_probe.json of an earlier run; None: learn it, if a term with a weight needs it."""
    answers: PositiveInt = 256
    """How many answers to sample for it, four to a prompt."""
    counterfactuals: PositiveInt = 2
    """Prompts made of each answer's, with one phrase swapped."""
    layer: int | None = None
    """Layer whose hidden states are read, from 0; None: the one that tells best on prompts that it was not fitted on."""
    check: bool = True
    """Where it is paid: fit it anew at the end, on the trained policy's answers, and say whether the old one still sees."""


_dataclass: Any = dataclass(frozen=True)  # so that type checkers take any section as an argument

if TYPE_CHECKING:

    class _Sections:
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **sections: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    _Sections = dataclasses.make_dataclass(
        "_Sections",
        [(term.name, term.config, field(default_factory=term.config)) for term in TERMS],
        frozen=True,
    )


@_dataclass
class RewardConfig(_Sections):
    """The reward: a weighted sum of terms, each brought to one scale first."""

    associations: AssociationsConfig = field(default_factory=AssociationsConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    functions: list[str] = field(default_factory=list)
    """Your own terms as dotted paths (package.module.function): a RewardTerm, or TRL's
    f(prompts, completions, completion_ids, **columns)."""
    function_weights: list[float] = field(default_factory=list)
    """One weight for each function; empty: 1 each."""
    function_settings: list[str] = field(default_factory=list)
    """Settings of your own terms that are classes, as name.key=value."""
    models: list[str] = field(default_factory=list)
    """Sequence-classification reward models (folder or Hub id) with one output."""
    model_weights: list[float] = field(default_factory=list)
    """One weight for each reward model; empty: 1 each."""
    watched: list[str] = field(default_factory=list)
    """Registered terms of weight 0 that are computed and logged all the same."""
    normalize: Literal["within_prompt", "running", "none"] = "within_prompt"
    """within_prompt: each term is centred on the mean of the prompt's candidates and divided by its standard deviation
    within prompts over the run, so that weights compare what training can follow; running: centred and divided over all
    answers of the run; none: raw values."""
    clip: NonNegativeFloat = 5.0
    """Normalised terms are clipped to plus or minus this; 0 does not clip."""

    def weights(self) -> dict[str, float]:
        """The weight of each registered term."""
        return {term.name: getattr(self, term.name).weight for term in TERMS}

    def asks(self, name: str) -> bool:
        """Whether a registered term is computed: it has a weight, or is watched."""
        return getattr(self, name).weight != 0 or name in self.watched

    def needs(self, what: str) -> bool:
        """Whether a term with a weight, or one that is watched, needs it, registered or named by its path."""
        if any(what in term.needs and self.asks(term.name) for term in TERMS):
            return True
        own = zip(self.functions, weights_of(self.functions, self.function_weights), strict=True)
        return any(what in getattr(import_dotted(path), "needs", ()) for path, weight in own if weight != 0)

    def conflicts(self) -> Iterator[str]:
        """What does not go together, a sentence each."""
        for kind, paths, given in (
            ("function", self.functions, self.function_weights),
            ("model", self.models, self.model_weights),
        ):
            if given and len(given) != len(paths):
                yield (
                    f"reward.{kind}_weights has {len(given)} values for {len(paths)} {kind}s: give one for each, or none"
                )
        if unknown := sorted(set(self.watched) - {term.name for term in TERMS}):
            yield f"reward.watched {unknown[0]!r} is no registered term: {', '.join(term.name for term in TERMS)}"
        for name in ("coverage", "grounded_coverage"):
            if getattr(self, name).new and getattr(self, name).turns != "first":
                yield (
                    f"reward.{name}.new pays for what earlier answers have not covered of the prompt's words: give "
                    f"--reward.{name}.turns first"
                )
        if self.probe.path is not None and self.probe.layer is not None:
            yield "reward.probe.layer: the probe of reward.probe.path has a layer of its own: leave one of the two out"
        if self.agreement.embedding_model is not None and self.agreement.by != "meaning":
            yield "reward.agreement.embedding_model embeds nothing: give --reward.agreement.by meaning"
        names = {path.rpartition(".")[2] for path in self.functions} | set(self.functions)
        for setting in self.function_settings:
            place, equals, _ = setting.partition("=")
            name, _, key = place.rpartition(".")
            if not equals or not key or name not in names:
                yield (
                    f"reward.function_settings {setting!r}: write name.key=value, the name being one of {sorted(names)}"
                )
        own = [
            *weights_of(self.functions, self.function_weights),
            *weights_of(self.models, self.model_weights),
        ]
        rewards = [weight for term, weight in zip(TERMS, self.weights().values(), strict=True) if term.scale is None]
        if not any([*rewards, *own]):
            yield (
                "the reward is empty: every weight is 0 but those of guards (echo); give at least one term a weight, as "
                "--reward.grounded_coverage.weight 1"
            )


def weights_of(paths: list[str], weights: list[float]) -> list[float]:
    """The weights that were given, or 1 for each path."""
    return weights or [1.0] * len(paths)
