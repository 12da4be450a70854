"""Before and after: both models answer the held-out prompts, a checker that the reward never saw judges the answers.

A policy that only became more peaked makes fewer mistakes when it is sampled, whether it learned anything or not. So the
start is also sampled at the temperature at which it is as peaked as the trained model, and both answer greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cagsr.config import SamplingConfig
from cagsr.evaluation.matched_entropy import answers_at, matching_temperature
from cagsr.evaluation.metrics import length_in_words, repetition, rouge_l
from cagsr.evaluation.perplexity import perplexity
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.quickstart.task import facts_covered, facts_said_again, wrong_facts
from cagsr.support.progress import working

Floats = NDArray[np.float64]

BATCH = 128
"""Answers written at once."""
DRAWS = 4
"""Sampled answers to each prompt: one alone leaves much to luck. Greedy there is but one."""


@dataclass(frozen=True)
class Measure:
    """A row of the table."""

    key: str
    label: str
    better: str
    """higher, lower, or empty where neither is better."""
    digits: int = 3


MEASURES = (
    Measure("facts_covered", "facts covered, share", "higher"),
    Measure("wrong_facts", "wrong facts, per answer", "lower"),
    Measure("said_again", "facts said again, per answer", "lower"),
    Measure("rouge_l", "ROUGE-L to a complete answer", "higher"),
    Measure("repetition", "repeated 3-grams, share", "lower"),
    Measure("words", "length, words", "", 1),
    Measure("perplexity", "perplexity under the judge", "lower", 2),
)


@dataclass(frozen=True)
class Answered:
    """One model's answers to the held-out prompts with their measures."""

    temperature: float
    """0 is greedy."""
    answers: tuple[tuple[str, ...], ...]
    """Each prompt's answers: ``DRAWS``, or one if greedy."""
    values: dict[str, Floats]
    """Key of a measure -> ``(prompts, draws)`` float64; ``perplexity`` is NaN for an empty answer."""
    entropy: float
    """Mean over the answers of each one's mean token entropy, nats."""

    def per_prompt(self, key: str) -> Floats:
        """Mean over each prompt's answers, ``(prompts,)``."""
        return self.values[key].mean(axis=1)

    def mean(self, key: str) -> float:
        """Mean over all answers; for perplexity the geometric one, so that a single odd answer does not decide."""
        values = self.values[key]
        return float(np.exp(np.nanmean(np.log(values)))) if key == "perplexity" else float(values.mean())


@dataclass(frozen=True)
class BeforeAfter:
    """What the table shows: the start and the trained model, three ways."""

    before: Answered
    """The start, sampled at temperature 1."""
    peaked: Answered
    """The start at the temperature at which its entropy is the trained model's."""
    after: Answered
    """The trained model, sampled at temperature 1."""
    before_greedy: Answered
    after_greedy: Answered

    def columns(self) -> dict[str, Answered]:
        """Column name -> answers, in the order of the table."""
        return {
            "before": self.before,
            f"before, T={self.peaked.temperature:.2f}": self.peaked,
            "after": self.after,
            "before, greedy": self.before_greedy,
            "after, greedy": self.after_greedy,
        }


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

    How peaked a model is, and which temperature matches it, is what ``cagsr compare`` means by it
    (:mod:`cagsr.evaluation.matched_entropy`). The perplexity is a third model's, the judge's.

    Raises:
        ModelError: no temperature makes the start as peaked as the trained model.
    """

    def answered(loaded: LoadedModel, temperature: float) -> Answered:
        draws = DRAWS if temperature > 0 else 1
        settings = replace(sampling, num_generations=draws, temperature=temperature)
        found = answers_at(loaded, prompts, settings, seed, BATCH)
        texts = [text.strip() for text in found.texts]
        own = tuple(tuple(texts[first : first + draws]) for first in range(0, len(texts), draws))
        values = measure(judge, prompts, own)
        task.advance()
        return Answered(temperature, own, values, float(found.entropy.mean()))

    with working("answering and judging", 5, "columns") as task:
        before, after = answered(start, 1.0), answered(trained, 1.0)
        several = replace(sampling, num_generations=DRAWS)
        known = {1.0: before.entropy}
        temperature = matching_temperature(start, prompts, several, after.entropy, seed, BATCH, known=known)
        peaked = answered(start, temperature)
        return BeforeAfter(before, peaked, after, answered(start, 0.0), answered(trained, 0.0))


def measure(
    judge: LoadedModel, prompts: Sequence[EncodedPrompt], answers: Sequence[Sequence[str]]
) -> dict[str, Floats]:
    """Measure the answers to each prompt: key of ``MEASURES`` -> ``(prompts, draws)`` float64."""
    pairs = [(encoded.prompt, answer) for encoded, own in zip(prompts, answers, strict=True) for answer in own]
    asked, texts = [prompt.text for prompt, _ in pairs], [answer for _, answer in pairs]
    values: dict[str, Sequence[float] | Floats] = {
        "facts_covered": [facts_covered(prompt.text, answer) for prompt, answer in pairs],
        "wrong_facts": [wrong_facts(prompt.text, answer) for prompt, answer in pairs],
        "said_again": [facts_said_again(prompt.text, answer) for prompt, answer in pairs],
        "rouge_l": [rouge_l(answer, [str(prompt.columns["reference"])]) for prompt, answer in pairs],
        "repetition": [repetition(answer) for answer in texts],
        "words": [length_in_words(answer) for answer in texts],
        "perplexity": perplexity(judge.model, judge.tokenizer, asked, texts),
    }
    return {key: np.asarray(value, dtype=np.float64).reshape(len(prompts), -1) for key, value in values.items()}
