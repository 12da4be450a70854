"""Per-token statistics of next-token distributions: log-probability, entropy, what sampling filters changed.

Each is of logits ``(positions, vocabulary)`` that are there for a moment (``models/output_layer.py``), row by row.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from cagsr.config import SamplingConfig
from cagsr.models.generation import GenerationRules
from cagsr.models.output_layer import Statistics


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under the softmax of ``logits / temperature``, ``(...)`` float32, differentiable.

    ``logits`` are ``(..., vocabulary)``, any float dtype, ``ids`` ``(...)`` int64; the temperature, > 0, is the sampling's.
    """
    return _tempered(logits, temperature).log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def logprobs_and(*statistics: Callable[[Tensor], Tensor], temperature: float) -> Statistics:
    """:func:`token_logprobs`, and statistics of the same distributions' log-probabilities, all from one softmax.

    ``statistics``: :func:`entropy_of`, :func:`certainty_of`. For the output layer: of logits, ids and places of a block of
    tokens, ``(tokens, 1 + statistics)`` float32.
    """

    def found(logits: Tensor, ids: Tensor, place: Tensor) -> Tensor:
        logprobs = _tempered(logits, temperature).log_softmax(dim=-1)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0]
        return torch.stack([chosen, *(statistic(logprobs) for statistic in statistics)], dim=-1)

    return found


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy, nats, of distributions given by their log-probabilities ``(..., vocabulary)``."""
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def sampling_correction(
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    generation: GenerationRules = GenerationRules(),  # noqa: B008  (frozen)
) -> Callable[[Tensor, Tensor], Tensor]:
    """Log-ratio between the scored policy and the distribution the token was really drawn from, <= 0.

    Top-p, top-k, a minimum length (no ``stop_ids`` in the first ``min_new_tokens`` places) and the model's generation
    config forbid tokens, so the sampler is ``policy / mass of the allowed tokens``. The ratio ``policy / sampler`` of an
    allowed token is that mass, at most 1; the loss weighs each token by it (importance sampling), so that the gradient is
    the scored policy's.

    Gives a function of logits ``(tokens, vocabulary)`` and the tokens' places in the response, ``(tokens,)`` int64; it gives
    ``(tokens,)`` float32.
    """
    warpers: list[LogitsProcessor] = []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    free = not warpers and sampling.min_new_tokens == 0 and not generation.never and not generation.never_first

    def log_mass(logits: Tensor, place: Tensor) -> Tensor:
        if free:
            return torch.zeros(place.shape, device=place.device)
        never, never_first = (
            torch.tensor([one for one in banned if one < logits.shape[-1]], dtype=torch.long, device=place.device)
            for banned in (generation.never, generation.never_first)
        )
        unused, stops = place.new_empty(0), torch.tensor(stop_ids, device=place.device)
        early, first = place < sampling.min_new_tokens, place == 0
        scaled = _tempered(logits, sampling.temperature)
        allowed = scaled.clone()
        allowed[:, never] = -torch.inf
        allowed[:, never_first] = allowed[:, never_first].masked_fill(first[:, None], -torch.inf)
        allowed[:, stops] = allowed[:, stops].masked_fill(early[:, None], -torch.inf)
        for warper in warpers:
            allowed = warper(unused, allowed)
        return (allowed.logsumexp(dim=-1) - scaled.logsumexp(dim=-1)).clamp(max=0.0)

    return log_mass


def certainty_of(logprobs: Tensor) -> Tensor:
    """``KL(U || p) = -log V - mean_v log p_v`` (self-certainty, arXiv 2505.19590, equation 5), nats, U uniform.

    ``(...)`` float32 >= 0 of log-probabilities ``(..., vocabulary)`` float32, all finite.
    """
    certainty = -logprobs.mean(dim=-1) - math.log(logprobs.shape[-1])
    return certainty.clamp(min=0.0)  # Rounding can push a uniform distribution below 0.


def readings_of(sampling: SamplingConfig, stop_ids: tuple[int, ...], generation: GenerationRules) -> Statistics:
    """What a scoring pass reads of each token (:class:`~cagsr.flow.Readings`), values aside, in its order."""
    temperature = sampling.temperature or 1.0
    of_distribution = logprobs_and(entropy_of, certainty_of, temperature=temperature)
    correction = sampling_correction(dataclasses.replace(sampling, temperature=temperature), stop_ids, generation)

    def found(logits: Tensor, ids: Tensor, place: Tensor) -> Tensor:
        return torch.cat([of_distribution(logits, ids, place), correction(logits, place)[:, None]], dim=1)

    return found


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature
