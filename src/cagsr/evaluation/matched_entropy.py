"""The sharpening control: another model sampled at the temperature at which it is as peaked as this one.

A policy that only became more peaked looks better at temperature 1 for that reason alone. So a trained model is compared
with its start at the temperature of *matched entropy*, the mean over answers of each one's mean token entropy: all count alike.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq

from cagsr.config import SamplingConfig
from cagsr.errors import ModelError
from cagsr.evaluation.intervals import Floats
from cagsr.flow import EncodedPrompt, EpisodeBatch
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.sharing import shares_prompts
from cagsr.rollout.rows import episode_rows
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.scoring.micro_batches import micro_batches
from cagsr.scoring.statistics import entropy_of, logprobs_and
from cagsr.support.progress import each, working

_FIRST_SLOPE = 2.5
"""First guess of d log(entropy) / d log(temperature), as a small model of E2E NLG has it."""
_SECANTS = 8
"""Rounds of the secant method before Brent's takes over."""
_AT_ONCE = 64
"""Answers in one micro-batch."""


@dataclass(frozen=True)
class SampledAnswers:
    """Sampled answers, those to one prompt in a row, with what sampling saw; every array ``(answers,)`` float64."""

    texts: tuple[str, ...]
    entropy: Floats
    """Mean over the answer's tokens of the entropy of ``softmax(logits / temperature)``, nats; at temperature 0, where
    that is zero, of ``softmax(logits)``."""
    tokens: Floats
    """Sampled tokens, the stop token included."""
    ended: Floats
    """1 where the answer stopped by itself, 0 where it was cut."""


def answers_at(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    seed: int,
    batch_size: int = 256,
    *,
    entropies: bool = True,
) -> SampledAnswers:
    """Answer every prompt ``sampling.num_generations`` times and read the entropies in one teacher-forced pass.

    The same seed, prompts and batch size give the same random numbers at every temperature (the sampler draws one
    exponential variate for each token of the vocabulary and takes the largest ratio), so that two temperatures, or two
    models of one vocabulary, are compared under the same luck. What top-p, top-k and a minimum length forbid is not in the
    entropy. The global random generators are left as they were. ``batch_size`` answers are sampled at once, at least one
    prompt's. Without ``entropies`` they are NaN and their pass is saved. The result is in the
    order of ``prompts``, ``num_generations`` answers to each in a row.
    """
    many = sampling.num_generations
    # Prompts of like length together: little padding. The order is the same at every temperature.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    total = len(prompts) * many
    texts = [""] * total
    entropy, tokens, ended = (np.zeros(total) for _ in range(3))
    start = 0
    ordered = [prompts[number] for number in order]
    for some, rollout in sample_in_batches(loaded, ordered, sampling, seed, max(1, batch_size // many)):
        places = [number * many + draw for number in order[start : start + len(some)] for draw in range(many)]
        start += len(some)
        for place, text in zip(places, rollout.completions, strict=True):
            texts[place] = text
        entropy[places] = mean_entropy(loaded, rollout, sampling.temperature or 1.0) if entropies else np.nan
        tokens[places] = rollout.sampled.sum(dim=1).cpu().numpy()
        ended[places] = rollout.ended.cpu().numpy()
    return SampledAnswers(tuple(texts), entropy, tokens, ended)


@torch.no_grad()
def mean_entropy(loaded: LoadedModel, rollout: EpisodeBatch, temperature: float) -> Floats:
    """Mean over each answer's tokens of the entropy of ``softmax(logits / temperature)``, nats; ``(batch,)`` float64.

    One teacher-forced pass over prompt + answer, in micro-batches of answers of like length.
    """
    result = np.zeros(len(rollout.completions))
    with loaded.autocast():
        share = shares_prompts(loaded, rollout)
        for index in each("reading entropies", micro_batches(rollout, _AT_ONCE, share=share), "batches"):
            inputs = PassInputs.of(episode_rows(rollout, index), share=share)
            statistics = logprobs_and(entropy_of, temperature=temperature)
            found = loaded.token_statistics(inputs, statistics, inputs.response_real)[..., 1]
            mean = found.double().sum(dim=1) / inputs.response_real.sum(dim=1)
            result[index.cpu().numpy()] = mean.cpu().numpy()
    return result


@working("matching the entropy")
def matching_temperature(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    target_entropy: float,
    seed: int,
    batch_size: int = 256,
    low: float = 0.2,
    high: float = 1.5,
    tolerance: float = 0.005,
    *,
    known: Mapping[float, float] | None = None,
) -> float:
    """Find the temperature at which a model's own samples have a given entropy.

    Hand in the prompts, the sampling (its temperature is ignored), the seed and the batch size that the target,
    ``answers_at(...).entropy.mean()``, was measured with. All temperatures see the same random numbers, so entropy is a
    smooth function of temperature, close to a power of it: the secant method on the logarithms, from temperature 1, is
    there after three or four rounds of sampling. Where it isn't, Brent's method between ``low`` and ``high`` takes over,
    until the temperature is right to ``tolerance``. ``known`` are entropies already measured under the same conditions, by
    temperature; one at 1.0 saves a round. Raises ModelError for a target (nats per token) outside what temperatures between
    ``low`` and ``high`` give.
    """
    if not target_entropy > 0:
        raise ModelError(f"{loaded.path}: no temperature above 0 gives an entropy of {target_entropy:g} nats.")
    found = dict(known or {})

    def error(temperature: float) -> float:
        """Logarithm of the samples' entropy over the target."""
        if temperature not in found:
            at = dataclasses.replace(sampling, temperature=temperature)
            found[temperature] = float(answers_at(loaded, prompts, at, seed, batch_size).entropy.mean())
        return math.log(max(found[temperature], 1e-12) / target_entropy)

    before = min(max(1.0, low), high)
    here = min(max(before * math.exp(-error(before) / _FIRST_SLOPE), low), high)
    for _ in range(_SECANTS):
        if low < here < high and abs(here - before) < tolerance:
            return here
        if here == before:  # wants to leave the interval
            break
        slope = (error(here) - error(before)) / math.log(here / before)
        if not slope > 0:
            break
        before, here = here, min(max(here * math.exp(-error(here) / slope), low), high)
    if error(low) > 0 or error(high) < 0:
        raise ModelError(
            f"{loaded.path}: an entropy of {target_entropy:.3f} nats per token is not reached at temperatures between "
            f"{low:g} ({target_entropy * math.exp(error(low)):.3f}) and {high:g} "
            f"({target_entropy * math.exp(error(high)):.3f})."
        )
    return float(brentq(error, low, high, xtol=tolerance))
