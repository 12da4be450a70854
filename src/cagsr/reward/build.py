"""From the configured reward to one that runs: terms, weights, warnings."""

from typing import Any

import torch
import yaml

from cagsr.config.validation import validate
from cagsr.errors import ConfigError
from cagsr.reward.function import RewardFunction
from cagsr.reward.model import load_reward_model
from cagsr.reward.normalize import Reduce
from cagsr.reward.registry import Resources
from cagsr.reward.settings import TERMS, RewardConfig, weights_of
from cagsr.reward.term import RewardTerm
from cagsr.reward.user_functions import load_function


def build_reward(
    config: RewardConfig,
    *,
    device: torch.device | str,
    resources: Resources = Resources(),  # noqa: B008  (frozen)
    reduce: Reduce | None = None,
) -> RewardFunction:
    """Build the reward: every term with a weight, or that is watched; reward models on ``device``; ``reduce`` sums over processes
    (None: one).

    Raises ConfigError: a value that can't be used, no term with a weight, or a function that can't be imported; ModelError:
    a reward model that can't be loaded; ValueError: a term with a weight needs what is not in ``resources``.
    """
    validate(config, "reward.")
    terms = weighted_terms(config, device, resources)
    return RewardFunction(
        [term for term, _ in terms], [weight for _, weight in terms], config.normalize, config.clip, reduce
    )


def weighted_terms(
    config: RewardConfig, device: torch.device | str, resources: Resources, *, every: bool = False
) -> list[tuple[RewardTerm, float]]:
    """The terms with their weights; arguments and errors as :func:`build_reward`.

    ``every``: registered terms of weight 0 as well, as far as they are to be ``shown`` and ``resources`` hold what they need
    (``score`` and ``diagnose``).
    """
    terms: list[tuple[RewardTerm, float]] = []
    for registered in TERMS:
        settings = getattr(config, registered.name)
        if config.asks(registered.name) or (every and registered.shown and resources.hold(registered.needs)):
            terms.append((registered.term(settings, resources), settings.weight))
    taken = {registered.name for registered in TERMS} | {"total"}
    for path, weight in zip(config.functions, weights_of(config.functions, config.function_weights), strict=True):
        name = _name(path, ".", taken)
        if weight != 0:
            term = load_function(path, name, _settings_of(config, path), resources)
            if term.name in taken - {name}:
                raise ConfigError(
                    f"reward.functions {path}: its term is named {term.name!r}, as another one; rename it"
                )
            taken.add(term.name)
            terms.append((term, weight))
    for path, weight in zip(config.models, weights_of(config.models, config.model_weights), strict=True):
        name = _name(path.rstrip("/"), "/", taken)
        if weight != 0:
            terms.append((load_reward_model(path, device, name), weight))
    return terms


def reward_warnings(config: RewardConfig) -> list[str]:
    """Say what is known to go wrong with a (valid) reward, one sentence each, before anyone spends a run on it."""
    validate(config, "reward.")
    return [sentence for term in TERMS for sentence in term.advice(getattr(config, term.name), config)]


def _name(path: str, separator: str, taken: set[str]) -> str:
    """The last part of a path, or the whole where another term has that name; taken from now on."""
    short = path.rpartition(separator)[2]
    name = path if short in taken else short
    taken.add(name)
    return name


def _settings_of(config: RewardConfig, path: str) -> dict[str, Any]:
    """What ``reward.function_settings`` says of a function, by the last part of its path or the whole."""
    found: dict[str, Any] = {}
    for given in config.function_settings:
        place, _, value = given.partition("=")
        name, _, key = place.rpartition(".")
        if name in (path, path.rpartition(".")[2]):
            try:
                found[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                problem = getattr(error, "problem", None) or "malformed"
                raise ConfigError(f"reward.function_settings {given!r}: the value is no YAML ({problem})") from error
    return found
