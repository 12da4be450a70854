"""Before and after: both models answer the held-out prompts, a checker that the reward never saw judges the answers.

A policy that only became more peaked makes fewer mistakes for that reason alone, so the start is also sampled as peaked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from cagsr.config import SamplingConfig
from cagsr.evaluation.intervals import Floats
from cagsr.evaluation.matched_entropy import answers_at, matching_temperature
from cagsr.evaluation.metrics import repetition, rouge_l, words
from cagsr.evaluation.perplexity import perplexity
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.quickstart.task import facts_covered, facts_said_again, wrong_facts
from cagsr.support.progress import working

BATCH = 128
"""Answers written at once."""
DRAWS = 4
"""Sampled answers to each prompt: one alone leaves much to luck. Greedy there is but one."""


@dataclass(frozen=True)
class Measure:
    """A row of the table."""

    key: str
    label: str
    better: Literal["higher", "lower", ""]
    digits: int = 3


TEXTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
MEASURES = tuple(Measure(key, **row) for key, row in TEXTS["measures"].items())


@dataclass(frozen=True)
class Answered:
    """One model's answers to the held-out prompts with their measures."""

    temperature: float
    answers: tuple[tuple[str, ...], ...]
    """Each prompt's answers: ``DRAWS``, or one if greedy (temperature 0)."""
    values: dict[str, Floats]
    """Key of a measure -> ``(prompts, draws)`` float64; ``perplexity`` is NaN for an empty answer."""
    entropy: float
    """Mean over the answers of each one's mean token entropy, nats."""

    def mean(self, key: str) -> float:
        """Mean over all answers; for perplexity the geometric one, so that a single odd answer does not decide."""
        values = self.values[key]
        return float(np.exp(np.nanmean(np.log(values)))) if key == "perplexity" else float(values.mean())


@dataclass(frozen=True)
class BeforeAfter:
    """What the table shows: the start and the trained model at temperature 1, the start as peaked as that, both greedy."""

    before: Answered
    peaked: Answered
    after: Answered
    before_greedy: Answered
    after_greedy: Answered

    def columns(self) -> dict[str, Answered]:
        """Column name -> answers, in the order of the table."""
        peaked = f"before, T={self.peaked.temperature:.2f}"
        return dict(
            zip(("before", peaked, "after", "before, greedy", "after, greedy"), vars(self).values(), strict=True)
        )


def compare(
    start: LoadedModel,
    trained: LoadedModel,
    judge: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    *,
    seed: int,
) -> BeforeAfter:
    """Let both models answer held-out prompts, with a ``reference`` each, and measure; the same seed, the same numbers.

    The temperature is that of :mod:`cagsr.evaluation.matched_entropy`, the perplexity a third model's, the judge's. Raises
    ModelError where no temperature makes the start as peaked as the trained model.
    """

    def answered(loaded: LoadedModel, temperature: float) -> Answered:
        draws = DRAWS if temperature > 0 else 1
        settings = replace(sampling, num_generations=draws, temperature=temperature)
        found = answers_at(loaded, prompts, settings, seed, BATCH)
        texts = [text.strip() for text in found.texts]
        values = measure(judge, [prompt for prompt in prompts for _ in range(draws)], texts)
        task.advance()
        own = tuple(tuple(texts[first : first + draws]) for first in range(0, len(texts), draws))
        shaped = {key: value.reshape(len(prompts), draws) for key, value in values.items()}
        return Answered(temperature, own, shaped, float(found.entropy.mean()))

    with working("answering and judging", 5, "columns") as task:
        before, after = answered(start, 1.0), answered(trained, 1.0)
        several = replace(sampling, num_generations=DRAWS)
        known = {1.0: before.entropy}
        temperature = matching_temperature(start, prompts, several, after.entropy, seed, BATCH, known=known)
        peaked = answered(start, temperature)
        return BeforeAfter(before, peaked, after, answered(start, 0.0), answered(trained, 0.0))


def measure(judge: LoadedModel, prompts: Sequence[EncodedPrompt], answers: Sequence[str]) -> dict[str, Floats]:
    """Measure answers, one prompt for each: key of ``MEASURES`` -> ``(answers,)`` float64."""
    pairs = [(encoded.prompt, answer) for encoded, answer in zip(prompts, answers, strict=True)]
    values: dict[str, Sequence[float] | Floats] = {
        "facts_covered": [facts_covered(prompt.text, answer) for prompt, answer in pairs],
        "wrong_facts": [wrong_facts(prompt.text, answer) for prompt, answer in pairs],
        "said_again": [facts_said_again(prompt.text, answer) for prompt, answer in pairs],
        "rouge_l": [rouge_l(answer, [str(prompt.columns["reference"])]) for prompt, answer in pairs],
        "repetition": [repetition(answer) for answer in answers],
        "words": [len(words(answer)) for answer in answers],
        "perplexity": perplexity(judge.model, judge.tokenizer, [prompt.text for prompt, _ in pairs], answers),
    }
    return {key: np.asarray(value, dtype=np.float64) for key, value in values.items()}
