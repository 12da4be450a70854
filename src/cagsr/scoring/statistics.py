"""Per-token statistics of next-token distributions: log-probability, entropy, what sampling filters changed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from cagsr.config import SamplingConfig
from cagsr.models.generation import GenerationRules

BLOCK_NUMBERS = 2**22
"""Logits turned into float32 probabilities at a time (16 MiB)."""


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under the softmax of ``logits / temperature``, ``(batch, response)`` float32,
    differentiable.

    ``logits`` are ``(batch, response, vocabulary)``, any float dtype, ``ids`` ``(batch, response)`` int64; the temperature,
    > 0, is the sampling's. Of large vocabularies a few positions are done at a time, and again in the backward pass: beside
    the logits themselves nothing of the size of the vocabulary is kept.
    """

    def logprobs(block: Tensor, own: Tensor) -> Tensor:
        return -functional.cross_entropy(block.float() / temperature, own, reduction="none")

    return _by_blocks(logprobs, logits, ids)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of each next-token distribution, nats; the rest as :func:`token_logprobs`."""
    return _by_blocks(lambda block: entropy_of((block.float() / temperature).log_softmax(dim=-1)), logits)


def logprobs_and(
    *statistics: Callable[[Tensor], Tensor], logits: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """:func:`token_logprobs`, and statistics of the same distributions' log-probabilities, all from one softmax.

    ``statistics``: :func:`entropy_of`, :func:`certainty_of`. ``(batch, response)`` float32 each, differentiable.
    """

    def found(block: Tensor, own: Tensor) -> Tensor:
        logprobs = (block.float() / temperature).log_softmax(dim=-1)
        chosen = logprobs.gather(-1, own[:, None])[:, 0]
        return torch.stack([chosen, *(statistic(logprobs) for statistic in statistics)], dim=-1)

    return _by_blocks(found, logits, ids).unbind(dim=-1)


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy, nats, of distributions given by their log-probabilities ``(..., vocabulary)``."""
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def _by_blocks(function: Callable[..., Tensor], logits: Tensor, *own: Tensor) -> Tensor:
    """``function(logits, *own)`` of flattened positions, a block at a time, as ``(batch, response, ...)``."""
    flat = [logits.flatten(0, 1), *(one.flatten() for one in own)]
    size = max(1, BLOCK_NUMBERS // logits.shape[-1])
    if len(flat[0]) <= size:
        found = function(*flat)
    else:
        blocks = zip(*(one.split(size) for one in flat), strict=True)
        if torch.is_grad_enabled() and logits.requires_grad:
            parts = [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
        else:
            parts = [function(*block) for block in blocks]
        found = torch.cat(parts)
    return found.view(*logits.shape[:2], *found.shape[1:])


def sampling_correction(
    logits: Tensor,
    ids: Tensor,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    generation: GenerationRules = GenerationRules(),  # noqa: B008  (frozen)
) -> Tensor:
    """Log-ratio between the scored policy and the distribution the token was really drawn from: ``(batch, response)``
    float32, <= 0.

    Top-p, top-k, a minimum length (no ``stop_ids`` in the first ``min_new_tokens`` positions) and the model's generation
    config forbid tokens, so the sampler is ``policy / mass of the allowed tokens``. The ratio ``policy / sampler`` of an
    allowed token is that mass, at most 1; the loss weighs each token by it (importance sampling), so that the gradient is
    the scored policy's.

    ``logits`` are ``(batch, response, vocabulary)``, ``ids`` ``(batch, response)`` int64, the sampled tokens.
    """
    never, never_first = (
        torch.tensor([one for one in banned if one < logits.shape[-1]], dtype=torch.long, device=ids.device)
        for banned in (generation.never, generation.never_first)
    )
    free = sampling.top_p >= 1.0 and sampling.top_k == 0 and sampling.min_new_tokens == 0
    if free and not len(never) and not len(never_first):
        return torch.zeros(ids.shape, device=ids.device)
    warpers: list[LogitsProcessor] = []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    unused, stops = ids.new_empty(0), torch.tensor(stop_ids, device=ids.device)

    def log_mass(block: Tensor, early: Tensor, first: Tensor) -> Tensor:
        scaled = block.float() / sampling.temperature
        allowed = scaled.clone()
        allowed[:, never] = -torch.inf
        allowed[:, never_first] = allowed[:, never_first].masked_fill(first[:, None], -torch.inf)
        allowed[:, stops] = allowed[:, stops].masked_fill(early[:, None], -torch.inf)
        for warper in warpers:
            allowed = warper(unused, allowed)
        return (allowed.logsumexp(dim=-1) - scaled.logsumexp(dim=-1)).clamp(max=0.0)

    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return _by_blocks(log_mass, logits, position < sampling.min_new_tokens, position == 0)


def certainty_of(logprobs: Tensor) -> Tensor:
    """``KL(U || p) = -log V - mean_v log p_v`` (self-certainty, arXiv 2505.19590, equation 5), nats, U uniform.

    ``(...)`` float32 >= 0 of log-probabilities ``(..., vocabulary)`` float32, all finite.
    """
    certainty = -logprobs.mean(dim=-1) - math.log(logprobs.shape[-1])
    return certainty.clamp(min=0.0)  # Rounding can push a uniform distribution below 0.
