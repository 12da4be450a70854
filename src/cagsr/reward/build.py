"""From the configured reward to one that runs: checks, warnings, terms, weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cagsr.config import RewardConfig
from cagsr.errors import ConfigError
from cagsr.models.texts import TokenTexts
from cagsr.reward.association import Associations
from cagsr.reward.combine import Reduce, RewardFunction
from cagsr.reward.functions import TextFunction, load_function
from cagsr.reward.model import RewardModel, load_reward_model
from cagsr.reward.protocol import RewardTerm
from cagsr.reward.terms import (
    ASSOCIATION_TERMS,
    TEXT_TERMS,
    AttentionTerm,
    BuiltinTerm,
    builtin_terms,
    needs_associations,
)


def build_reward(
    config: RewardConfig,
    *,
    device: torch.device | str,
    associations: Associations | None = None,
    texts: TokenTexts | None = None,
    reduce: Reduce | None = None,
) -> RewardFunction:
    """Build the reward: every term whose weight is not 0.

    Args:
        config: the reward.
        device: where reward models run.
        associations: what the association terms read; they need it when they have a weight.
        texts: what each token says (:attr:`cagsr.models.load.LoadedModel.texts`); ``grounded_coverage`` and
            ``copy_coverage`` need it when they have a weight.
        reduce: sums a small tensor over processes; None for one process.

    Raises:
        ConfigError: a value that can't be used, no term with a weight, or a function that can't be imported.
        ModelError: a reward model that can't be loaded.
        ValueError: a term has a weight that needs associations or texts, and none were given.
    """
    check_reward_config(config)
    if associations is None and needs_associations(config):
        raise ValueError("associated_coverage and unsupported need associations: learn or read them first")
    builtin = builtin_terms(config, associations, texts)
    terms = [(term, weight) for term, weight in builtin if weight != 0]
    if texts is None and any(term.name in TEXT_TERMS for term, _ in terms):
        raise ValueError("grounded_coverage and copy_coverage compare what tokens say: give the model's texts")
    taken = {term.name for term, _ in builtin} | ASSOCIATION_TERMS | {"total"}
    for path, weight in zip(config.functions, _weights(config.functions, config.function_weights), strict=True):
        short = path.rpartition(".")[2]
        name = path if short in taken else short
        taken.add(name)
        if weight != 0:
            term = load_function(path, name)
            if term.name in taken - {name}:
                raise ConfigError(
                    f"reward.functions {path}: its term is named {term.name!r}, as another one; rename it"
                )
            taken.add(term.name)
            terms.append((term, weight))
    for path, weight in zip(config.models, _weights(config.models, config.model_weights), strict=True):
        short = path.rstrip("/").rpartition("/")[2]
        name = path if short in taken else short
        taken.add(name)
        if weight != 0:
            terms.append((load_reward_model(path, device, name), weight))
    return RewardFunction(
        [term for term, _ in terms], [weight for _, weight in terms], config.normalize, config.clip, reduce
    )


def attention_terms(terms: Sequence[RewardTerm]) -> list[AttentionTerm] | None:
    """What can be worked out of each micro-batch's attention, so that no map is kept.

    Returns:
        The terms that read the attention, none of them if there is no such term; None: a function of the user's may
        look at the maps, so they must be kept.
    """
    if not all(isinstance(term, BuiltinTerm | TextFunction | RewardModel) for term in terms):
        return None
    return [term for term in terms if isinstance(term, AttentionTerm)]


def check_reward_config(config: RewardConfig) -> None:
    """Check the values of a reward config, without importing or loading anything.

    Raises:
        ConfigError: a setting out of range, a list of weights of the wrong length, or every weight 0.
    """
    weights = {f"reward.{term.name}.weight": weight for term, weight in builtin_terms(config)}
    weights["reward.associated_coverage.weight"] = config.associated_coverage.weight
    weights["reward.unsupported.weight"] = config.unsupported.weight
    for kind, paths, given in (
        ("function", config.functions, config.function_weights),
        ("model", config.models, config.model_weights),
    ):
        if given and len(given) != len(paths):
            raise ConfigError(
                f"reward.{kind}_weights has {len(given)} values for {len(paths)} {kind}s: give one for each, or none"
            )
        for path, weight in zip(paths, _weights(paths, given), strict=True):
            weights[f"reward.{kind}_weights ({path})"] = weight
    for key, weight in weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"{key} is {weight}: give a finite number")
    if not any(weights.values()):
        raise ConfigError(
            "the reward is empty: every weight is 0; give at least one term a weight, as --reward.coverage.weight 1"
        )
    thresholds = {"coverage": config.coverage.threshold, "grounded_coverage": config.grounded_coverage.threshold}
    for name, threshold in thresholds.items():
        if not 0 < threshold <= 1:
            raise ConfigError(f"reward.{name}.threshold is {threshold}: give an attention above 0, up to 1")
    if not 0 <= config.focus.entropy_floor < 1:
        raise ConfigError(f"reward.focus.entropy_floor is {config.focus.entropy_floor}: give a value from 0 to below 1")
    if config.repetition.n < 1:
        raise ConfigError(f"reward.repetition.n is {config.repetition.n}: n-grams have at least 1 token")
    if config.associations.answers < 1 or config.associations.min_count < 1:
        raise ConfigError("reward.associations.answers and reward.associations.min_count must be 1 or more")
    if not 0 < config.associations.floor <= 1:
        raise ConfigError(f"reward.associations.floor is {config.associations.floor}: give a value above 0, up to 1")
    if config.length.target is not None and config.length.target < 0:
        raise ConfigError(f"reward.length.target is {config.length.target}: give a number of tokens, 0 or more")
    if not config.clip >= 0:
        raise ConfigError(f"reward.clip is {config.clip}: give 0 (no clipping) or a positive number")


def reward_warnings(config: RewardConfig) -> list[str]:
    """Say what is known to go wrong with this reward, one sentence each, before anyone spends a run on it.

    Raises:
        ConfigError: as :func:`check_reward_config`.
    """
    check_reward_config(config)
    warnings = []
    if config.mean_mass.weight > 0:
        warnings.append(
            "mean_mass pays for short answers (correlation with length -0.6 to -0.75 within a prompt) and hardly sees "
            "relevance: prefer coverage, or watch the length."
        )
    if config.focus.weight > 0 and config.focus.entropy_floor == 0:
        warnings.append(
            "focus without an entropy_floor pays for attention that collapses onto one word: set "
            "reward.focus.entropy_floor (0.1 to 0.3)."
        )
    if config.repetition.weight > 0:
        warnings.append("repetition has a positive weight, which pays for repeating: a penalty has a negative one.")
    if config.unsupported.weight > 0:
        warnings.append("unsupported has a positive weight, which pays for inventing: a penalty has a negative one.")
    if config.unsupported.weight < 0 and config.associated_coverage.weight <= 0:
        warnings.append(
            "unsupported without associated_coverage pays for saying less: give reward.associated_coverage.weight a value."
        )
    if config.repetition.weight == 0:
        warnings.append(
            "without a repetition penalty a policy can gain by repeating itself: watch response/repetition."
        )
    if config.length.target is not None and config.length.weight > 0:
        warnings.append(
            "length with a target and a positive weight pays for missing the target: give a negative weight."
        )
    others = [weight for term, weight in builtin_terms(config) if term.name not in ("self_certainty", "repetition")]
    others.append(config.associated_coverage.weight)
    if config.self_certainty.weight > 0 and not any([*others, *config.functions, *config.models]):
        warnings.append(
            "self_certainty alone is known to gain early and then to shorten answers and collapse: add coverage, and "
            "watch length, entropy and the KL."
        )
    return warnings


def _weights(paths: Sequence[str], weights: Sequence[float]) -> Sequence[float]:
    return weights or [1.0] * len(paths)
