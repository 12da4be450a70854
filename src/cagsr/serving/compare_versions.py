"""Whether a new version is put in place: both versions answer the same prompts, and the base model's attention judges both.

What decides is ``reasons_against``; everything that it looks at is kept with the version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cagsr.config import MonitorConfig, SamplingConfig
from cagsr.evaluation.held_out import choose_metric, judge
from cagsr.evaluation.intervals import Interval, paired_difference
from cagsr.evaluation.metrics import repetition
from cagsr.flow import EncodedPrompt
from cagsr.models.reference import Reference
from cagsr.reward.weigh import weigh
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.scoring.answers import Response
from cagsr.scoring.scorer import Scorer
from cagsr.serving.judges import Judging
from cagsr.serving.policies import Policies

ANSWERS = 4
"""Of each version to each prompt."""
AT_ONCE = 8
"""Prompts."""
OF_THE_REWARD = ("dominance", "flat", "shared_prompts")
"""Warnings of a training that say nothing against the policy."""


@dataclass(frozen=True)
class Measured:
    """One version on the prompts."""

    reward: float
    """Mean, on the scale of both versions' answers."""
    metric: float
    """Mean of a measure that shares nothing with the reward, lexical relevance."""
    entropy: float
    """Mean of a token's distribution, nats."""
    kl: float
    """To the base model, nats per answer."""
    repetition: float
    ended: float
    """Share of the answers that end by themselves."""
    length: float
    """Tokens."""


@dataclass(frozen=True)
class Compared:
    """A new version against the one that is served."""

    compared_on: int
    """Prompts."""
    metric: str
    served: Measured
    new: Measured
    reward: Interval
    """New minus served, paired by prompt."""
    relevance: Interval
    """The same of the metric."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """What the training's monitors said, by their names."""


def reasons_against(compared: Compared, monitors: MonitorConfig, kl: float) -> list[str]:
    """Why the new version is worse, a sentence each; none: it is put in place.

    Its mean reward may not be lower than the served version's, nor may the metric be with 95 % confidence; it has to stay within
    the ``kl`` budget and what the monitors watch; and no monitor may have warned of the policy.
    """
    old, new, found = compared.served, compared.new, list[str]()
    if compared.reward.mean < 0:
        found.append(f"The reward is lower: {compared.reward:.3f}.")
    if compared.relevance.high < 0:
        found.append(f"{compared.metric} is lower: {compared.relevance:.3f}.")
    if new.kl > kl:
        found.append(f"The KL to the base model is {new.kl:.2f} nats per answer, above the budget of {kl:g}.")
    if new.entropy < monitors.entropy * old.entropy:
        found.append(f"The entropy fell from {old.entropy:.3f} to {new.entropy:.3f}.")
    if new.repetition > old.repetition + monitors.repetition:
        found.append(f"Repetition rose from {old.repetition:.3f} to {new.repetition:.3f}.")
    if new.ended < min(old.ended, monitors.ended):
        found.append(f"Only {new.ended:.0%} of the answers end by themselves.")
    found += [f"While it was trained: {told}" for name, told in compared.warnings.items() if name not in OF_THE_REWARD]
    return found


def compare(
    policies: Policies,
    served: int,
    new: int,
    prompts: Sequence[EncodedPrompt],
    judging: Judging,
    sampling: SamplingConfig,
    warnings: Mapping[str, str],
) -> Compared:
    """Have two versions answer the prompts, and judge the answers together."""
    sides = [_Side.of(policies, number, prompts, judging, sampling) for number in (served, new)]
    asked = [prompt for prompt in prompts for _ in range(ANSWERS)] * 2
    answers = [*sides[0].answers, *sides[1].answers]
    with policies.using(0) as base:
        scorer = judging.scorer(base, sampling.temperature, base=True)
        raw = scorer.raw_values(asked, answers)
    group = torch.arange(len(prompts)).repeat_interleave(ANSWERS).repeat(2)
    reward = weigh(raw, scorer.weights, judging.reward, group).total.view(2, len(prompts), ANSWERS)
    measure = choose_metric(None, prompts)
    values = judge(measure, [one.prompt for one in asked], [one.text for one in answers])
    metric = torch.tensor(values, dtype=torch.float64).view(2, len(prompts), ANSWERS)
    old, new_one = (
        Measured(
            reward=float(reward[at].mean()),
            metric=float(metric[at].mean()),
            entropy=side.entropy,
            kl=side.kl,
            repetition=_mean([repetition(one.text) for one in side.answers]),
            ended=_mean([float(one.ended) for one in side.answers]),
            length=_mean([len(one.ids) for one in side.answers]),
        )
        for at, side in enumerate(sides)
    )
    return Compared(
        compared_on=len(prompts),
        metric=measure.name,
        served=old,
        new=new_one,
        reward=_by_prompt(reward),
        relevance=_by_prompt(metric),
        warnings=warnings,
    )


def _by_prompt(values: Tensor) -> Interval:
    """New minus served of ``(2, prompts, answers)``."""
    served, new = values.mean(dim=-1).numpy()
    return paired_difference(new, served)


@dataclass(frozen=True)
class _Side:
    answers: list[Response]
    entropy: float
    kl: float

    @classmethod
    def of(
        cls,
        policies: Policies,
        number: int,
        prompts: Sequence[EncodedPrompt],
        judging: Judging,
        sampling: SamplingConfig,
    ) -> "_Side":
        """Sample the answers of one version; both have the same luck."""
        several = replace(sampling, num_generations=ANSWERS)
        answers: list[Response] = []
        entropy = kl = tokens = 0.0
        with policies.using(number) as loaded:
            reference = Reference(loaded) if number else None
            scorer = Scorer(loaded, judging.attention, several, AT_ONCE * ANSWERS, reference=reference)
            for _, episodes in sample_in_batches(loaded, prompts, several, 0, AT_ONCE):
                readings, base = scorer.read(episodes)
                entropy += float(readings.entropy.sum())
                kl += float((readings.logprobs - base)[episodes.sampled].sum())
                tokens += float(episodes.lengths.sum())
                for row, text in enumerate(episodes.completions):
                    ids = episodes.ids[row][episodes.sampled[row]].tolist()
                    answers.append(Response(text, tuple(ids), bool(episodes.ended[row])))
        return cls(answers, entropy / tokens, kl / len(answers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
