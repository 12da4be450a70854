"""What finished answers are worth by a reward: their raw terms brought to one scale, weighted and summed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.config import RewardConfig
from cagsr.reward.normalize import Normalizer
from cagsr.reward.values import TermValues


@dataclass(frozen=True)
class Scales:
    """The scales that a training run's reward learned."""

    run: str
    """Its folder."""
    moments: Mapping[str, Mapping[str, float]]
    """As ``Normalizer.state_dict`` gives them."""


@dataclass(frozen=True)
class Weighed:
    """A reward and what it is the sum of."""

    contributions: Mapping[str, Tensor]
    """Name -> ``(answers,)`` float64, weight times normalised value, of each term with a weight; 0 where it does not
    apply or does not vary."""
    total: Tensor
    """``(answers,)`` float64."""
    note: str
    """Which scales were used, in a sentence for the user."""


def weigh(
    raw: Mapping[str, Tensor],
    weights: Mapping[str, float],
    config: RewardConfig,
    group: Tensor,
    scales: Scales | None = None,
) -> Weighed:
    """Weigh the raw terms ``(answers,)`` of a set of answers as training does
    (:class:`~cagsr.reward.normalize.Normalizer`).

    With a run's scales an answer's reward depends on the other answers to its prompt and on nothing else. Without them the
    scales come from all the answers given here; a single answer has none and is weighed raw.

    ``raw`` is NaN where a term does not apply, terms of weight 0 are left out, ``group`` is equal for answers to one
    prompt. RunError where the scales are those of other terms.
    """
    active = {name: weight for name, weight in weights.items() if weight != 0}
    if config.normalize == "none":
        normalizer, note = Normalizer(list(active), "none"), "weight times the raw value (--reward.normalize none)"
    elif scales is not None:
        normalizer = Normalizer(list(active), config.normalize, config.clip)
        normalizer.load_state_dict(scales.moments)
        note = f"on the scales of the run {scales.run}"
    elif len(group) == 1:
        normalizer = Normalizer(list(active), "none")
        note = "weight times the raw value, since one answer alone has no scale (--reward_from RUN takes a run's)"
    else:
        normalizer = Normalizer(list(active), config.normalize, config.clip)
        normalizer.update({name: TermValues.of(raw[name]) for name in active}, group)
        note = f"on the scales of these {len(group):,} answers as a whole (--reward_from RUN takes a run's)"
    if normalizer.normalize == "within_prompt":
        note += _compared(group)
    parts = contributions(raw, active, normalizer, group)
    return Weighed(parts, torch.stack(list(parts.values())).sum(dim=0), f"Contributions: {note}.")


def _compared(group: Tensor) -> str:
    counts = torch.unique(group, return_counts=True)[1]
    alone, prompts = int((counts == 1).sum()), len(counts)
    if alone == 0:
        return ", centred on the mean of the answers to the prompt"
    if alone == prompts:
        return ", centred on the mean of all answers, because each is the only one to its prompt"
    return (
        f", centred on the mean of the answers to the prompt, or of all answers for the {alone:,} of {prompts:,} prompts "
        "that have one"
    )


def contributions(
    raw: Mapping[str, Tensor], weights: Mapping[str, float], normalizer: Normalizer, group: Tensor
) -> dict[str, Tensor]:
    """Name -> ``(answers,)`` float64, weight times normalised value, for each name of ``weights``."""
    return {
        name: weight * normalizer(name, TermValues.of(raw[name].double()), group) for name, weight in weights.items()
    }
