"""The terms that have a section of their own in the settings: those of ``reward/terms/``, and those of other packages.

A term is one file: the formula, its settings and what it needs. ``@register`` makes it known by its ``name``::

    @register
    @dataclass(frozen=True)
    class Exclamations:
        name: ClassVar = "exclamations"
        needs: ClassVar = frozenset()
        settings: ExclamationsConfig

        def __call__(self, batch: RewardBatch) -> Tensor: ...

A guard against what hardly any usual answer does has a ``scale`` of its own, by which its values are multiplied: brought to
the scale of the others, the first answer that does it would be magnified without bound.

``settings`` is annotated with the term's dataclass of settings, which has a ``weight`` (:class:`TermConfig`). A package offers
such terms by entry points of the group ``cagsr.reward_terms`` that name their classes or modules.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from keyword import iskeyword
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_type_hints

from cagsr.errors import ConfigError
from cagsr.reward.term import SUPPORT, UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

    from cagsr.flow import EpisodeBatch, Prompt
    from cagsr.models.texts import TokenTexts
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.association import Associations
    from cagsr.reward.term import RewardTerm

GROUP = "cagsr.reward_terms"
"""Entry points of other packages."""
LAST = 1000
_ClassT = TypeVar("_ClassT", bound=type[Any])


@dataclass(frozen=True)
class TermConfig:
    """What the settings of every term have."""

    weight: float = 0.0
    """Weight in the reward; 0 leaves the term out."""


@dataclass(frozen=True)
class LookingConfig(TermConfig):
    """What the settings of a term have that reads the attention to what stands before an answer."""

    turns: Literal["all", "first", "latest"] = "all"
    """Of a conversation: over which turns it looks. all: the prompt and all that was said since; first: the prompt; latest:
    what was said to it last, and its answer before."""


@dataclass(frozen=True)
class CoveringConfig(LookingConfig):
    """What the settings of a coverage have that grows from token to token."""

    dense: bool = False
    """Pay each token for the coverage it adds (the gains sum to the coverage) instead of all at the end."""
    new: bool = False
    """Of steps and conversations, with ``turns first``: pay an answer only for what those before it have not covered of the
    prompt, so that what all are paid is the coverage by all that was said. False: as if each stood alone, which pays for
    saying everything in every step."""


class HiddenLikelihood(Protocol):
    """Reads answers anew with tokens of their prompts hidden (:class:`cagsr.scoring.hidden_words.HiddenWords`)."""

    def __call__(self, episodes: EpisodeBatch, hidden: Tensor, *, same: bool = False) -> Tensor:
        """``(batch, response)`` log-probabilities; ``hidden`` is ``(batch, prompt)`` bool, the ``same`` in a prompt's rows."""


class StatingTokens(Protocol):
    """Finds the words in answers that state something (:class:`cagsr.scoring.stating_tokens.StatingTokensOf`)."""

    def __call__(self, episodes: EpisodeBatch) -> Tensor:
        """``(batch, response)`` int64: which of them a token is a piece of, -1 for none."""


class TargetLikelihood(Protocol):
    """Reads other endings of answers (:class:`cagsr.scoring.target_likelihood.TargetLikelihoodOf`)."""

    def __call__(
        self, episodes: EpisodeBatch, rows: Tensor, starts: Sequence[int], targets: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """``(rows, target)`` log-probabilities of texts behind the first characters of answers, and which there are, bool."""


@dataclass(frozen=True)
class Resources:
    """What terms may need besides the batch; a term gets those that it names in ``needs``, by the same names."""

    texts: TokenTexts | None = None
    """What each token says (:attr:`cagsr.models.load.LoadedModel.texts`)."""
    associations: Associations | None = None
    """Which words go together, learned from the model's own answers."""
    hidden_likelihood: HiddenLikelihood | None = None
    """What answers are worth to the model without some words of their prompts; a pass more."""
    frequency: DocumentFrequency | None = None
    """How many prompts hold each word."""
    stating_tokens: StatingTokens | None = None
    """Which tokens of answers are words that state something."""
    target_likelihood: TargetLikelihood | None = None
    """What other endings of answers are worth to the model; a pass more."""

    def hold(self, needs: Iterable[str]) -> bool:
        """Whether everything is there of what a term needs."""
        return all(getattr(self, name) is not None for name in RESOURCES & set(needs))

    def given(self, needs: Iterable[str], term: str) -> dict[str, Any]:
        """Those of them that a term needs, by name; ValueError where one is not there, ConfigError for what nobody has."""
        known = RESOURCES | UNKNOWN | {SUPPORT}
        if strange := sorted(set(needs) - known):
            raise ConfigError(
                f"the reward term {term} needs {strange[0]!r}, which there is not; it may name {sorted(known)}"
            )
        for name in (found := sorted(RESOURCES & set(needs))):
            if getattr(self, name) is None:
                raise ValueError(f"the reward term {term} needs {name}, and none were given")
        return {name: getattr(self, name) for name in found}


RESOURCES = frozenset(Resources.__dataclass_fields__)
COSTLY = frozenset({"hidden_likelihood", "target_likelihood"})
"""Those that read the answers anew."""
COUNTED = frozenset({"frequency", "stating_tokens"})
"""Those that are counted in a set of prompts."""


@dataclass(frozen=True)
class TermClass:
    """A registered term."""

    name: str
    build: Callable[..., RewardTerm]
    config: type[Any]
    """Its settings, a dataclass with a ``weight``."""
    needs: frozenset[str]
    place: int
    shown: bool
    """Whether ``score`` and ``diagnose`` show its values where it has no weight: not where it runs code, or asks for labels."""
    scale: float | None
    """What its values are multiplied with instead of being brought to one scale; None: they are brought to it."""
    missing: Callable[[Any, Iterable[Prompt]], str | None]
    """``(its settings, the prompts) -> what none of their rows has that the term needs``, None where nothing is missing."""
    advice: Callable[[Any, Any], Iterable[str]]
    """``(its settings, the whole reward's) -> sentences``: what is known to go wrong with them."""

    def term(self, settings: Any, resources: Resources) -> RewardTerm:
        """The term with these settings; ValueError where a resource that it needs is not there."""
        return self.build(settings, **resources.given(self.needs, self.name))


RESERVED = frozenset((
    "associations", "probe", "functions", "function_weights", "function_settings", "models", "model_weights", "normalize", "clip",
    "weights", "watched", "asks", "needs", "conflicts", "total",
))  # fmt: skip
"""What else the settings and the metrics of the reward have under these names."""
_TERMS: dict[str, TermClass] = {}


def register(cls: _ClassT) -> _ClassT:
    """Make a class of terms known by its name.

    ConfigError: the name is another term's or can't be one, or its settings have no weight.
    """
    name, config = cls.name, settings_class(cls)
    if not (isinstance(name, str) and name.isidentifier() and not iskeyword(name)) or name in RESERVED:
        raise ConfigError(f"a reward term can't be called {name!r}: it is to name a section of the settings")
    if "weight" not in getattr(config, "__dataclass_fields__", ()):
        raise ConfigError(f"the settings of the reward term {name!r} have no weight: derive them from TermConfig")
    other = _TERMS.get(name)
    if other is not None and (other.build.__module__, other.build.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"two reward terms are called {name!r} ({other.build.__module__}, {cls.__module__})")
    _TERMS[name] = TermClass(
        name=name,
        build=cls,
        config=config,
        needs=frozenset(cls.needs),
        place=getattr(cls, "place", LAST),
        shown=getattr(cls, "shown", True),
        scale=getattr(cls, "scale", None),
        missing=getattr(cls, "missing", lambda settings, prompts: None),
        advice=getattr(cls, "advice", lambda settings, reward: ()),
    )
    return cls


def settings_class(cls: type[Any]) -> Any:
    """What a class annotates its ``settings`` with, None if it doesn't; its other annotations may name anything."""
    for base in cls.__mro__:
        own = {key: kind for key, kind in vars(base).get("__annotations__", {}).items() if key == "settings"}
        if own:
            return get_type_hints(SimpleNamespace(__annotations__=own), vars(sys.modules[base.__module__]))["settings"]
    return None


def registered_terms() -> tuple[TermClass, ...]:
    """All terms with a section in the settings: ours in their places, then those of other packages by name.

    ConfigError: a package's entry point can't be loaded.
    """
    from cagsr.reward import terms

    for module in pkgutil.iter_modules(terms.__path__, f"{terms.__name__}."):
        importlib.import_module(module.name)
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # importing runs another package's code, which can raise anything
            raise ConfigError(
                f"the reward term {point.name!r} of {point.value} can't be loaded ({type(error).__name__}: {error}); mend or "
                "uninstall its package"
            ) from error
    return tuple(sorted(_TERMS.values(), key=lambda term: (term.place, term.name)))
