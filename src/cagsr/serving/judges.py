"""What answers are worth by the reward, in each version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cagsr.config import AttentionConfig, RewardConfig, SalienceConfig
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.models.reference import Reference
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_associations import NAME_A_FILE, named_associations
from cagsr.reward.learn_probe import named_probe
from cagsr.reward.weigh import Scales, weigh
from cagsr.runs.folder import CONFIG
from cagsr.runs.reward import read_run_reward
from cagsr.scoring.answers import Response
from cagsr.serving.settings import ServeConfig
from cagsr.serving.versions import Versions


@dataclass(frozen=True)
class Judging:
    """By which reward answers are judged."""

    reward: RewardConfig
    attention: AttentionConfig
    salience: SalienceConfig
    frequency: DocumentFrequency | None
    """None: no prompts are known whose words could be counted."""
    scales: Scales | None
    """None: values are brought to the scale of the answers to the prompt at hand."""

    def scorer(self, loaded: LoadedModel, temperature: float, *, base: bool) -> AnswerScorer:
        """Who reads the terms. ``base``: the model at hand is the base itself, whose attention is nobody else's.

        ConfigError as ``AnswerScorer``, and where the reward needs what nobody has learned.
        """
        from_base = self.attention.source == "reference" and not base
        return AnswerScorer(
            loaded,
            self.reward,
            self.attention,
            self.salience,
            temperature=temperature,
            associations=named_associations(self.reward, f"name a run with --reward_from, or {NAME_A_FILE}"),
            probe=named_probe(self.reward),
            frequency=self.frequency,
            reference=Reference(loaded) if from_base else None,
            every=False,
        )


@dataclass(frozen=True)
class Worth:
    """What one answer is worth."""

    total: float
    terms: dict[str, float | None]
    """Raw values; None where a term does not apply."""
    contributions: dict[str, float]


class Judges:
    """The rewards of the versions: that of ``reward_from``, else a version's own run's, else the one in the settings."""

    def __init__(self, config: ServeConfig, versions: Versions, frequency: DocumentFrequency | None) -> None:
        """``frequency``: words counted in the prompts that versions are compared on. ConfigError, RunError: no such reward."""
        self._config, self._versions = config, versions
        self._plain = Judging(config.reward, config.attention, config.salience, frequency, None)
        if config.reward_from is not None:
            self._plain = judging_of_run(config.reward_from)
        self._known: dict[int, Judging] = {0: self._plain}
        self._scorers: dict[int, AnswerScorer] = {}

    def of(self, number: int) -> Judging:
        """The reward that a version's answers are judged by."""
        if number not in self._known:
            folder = self._versions.path(number)
            own = self._config.reward_from is None and (folder / CONFIG).is_file()
            self._known[number] = judging_of_run(str(folder)) if own else self._plain
        return self._known[number]

    def scorer(self, loaded: LoadedModel, number: int) -> AnswerScorer:
        """Who reads the terms in a version; kept as long as the model is the same object. ConfigError as ``Judging.scorer``."""
        known = self._scorers.get(number)
        if known is None or known.loaded is not loaded:
            temperature = self._config.sampling.temperature
            known = self._scorers[number] = self.of(number).scorer(loaded, temperature, base=number == 0)
        return known

    def worth(
        self, loaded: LoadedModel, number: int, prompt: EncodedPrompt, answers: Sequence[Response]
    ) -> tuple[list[Worth], str]:
        """What the answers to a prompt are worth, judged by ``loaded``, and a sentence about the scales."""
        judging, scorer = self.of(number), self.scorer(loaded, number)
        raw = scorer.raw_values([prompt] * len(answers), answers)
        weighed = weigh(raw, scorer.weights, judging.reward, torch.zeros(len(answers)), judging.scales)
        return [
            Worth(
                float(weighed.total[row]),
                {name: None if value[row].isnan() else float(value[row]) for name, value in raw.items()},
                {name: float(value[row]) for name, value in weighed.contributions.items()},
            )
            for row in range(len(answers))
        ], weighed.note


def judging_of_run(run: str) -> Judging:
    """The reward of a training run, or of what a version has kept of one."""
    learned = read_run_reward(run)
    return Judging(learned.reward, learned.attention, learned.salience, learned.frequency, learned.scales)
