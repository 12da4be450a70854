"""Per-token statistics of next-token distributions: log-probability, entropy, what sampling filters changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    """Log-probability of each token under the softmax of ``logits / temperature``.

    Of large vocabularies a few positions are done at a time, and again in the backward pass: beside the logits themselves
    nothing of the size of the vocabulary is kept.

    Args:
        logits: ``(batch, response, vocabulary)``, any float dtype.
        ids: ``(batch, response)`` int64.
        temperature: > 0; the one the answers were sampled at.

    Returns:
        ``(batch, response)`` float32, differentiable.
    """
    return _by_blocks(lambda block, own: _logprobs(block, own, temperature), logits, ids)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of each next-token distribution ``softmax(logits / temperature)``.

    Args:
        logits: ``(batch, response, vocabulary)``.
        temperature: > 0.

    Returns:
        ``(batch, response)`` float32, nats, differentiable; memory as in :func:`token_logprobs`.
    """
    return _by_blocks(lambda block: _entropy((block.float() / temperature).log_softmax(dim=-1)), logits)


def logprobs_and_entropy(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both at once, from one softmax.

    Args:
        logits: ``(batch, response, vocabulary)``.
        ids: ``(batch, response)`` int64.
        temperature: > 0.

    Returns:
        :func:`token_logprobs` and :func:`token_entropy`.
    """
    logprobs, entropy = _from_one_softmax([_entropy], logits, ids, temperature)
    return logprobs, entropy


def logprobs_entropy_and_certainty(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """All three that scoring wants, from one softmax.

    Args:
        logits: ``(batch, response, vocabulary)``.
        ids: ``(batch, response)`` int64.
        temperature: > 0.

    Returns:
        :func:`token_logprobs`, :func:`token_entropy` and the :func:`self_certainty` of
        ``softmax(logits / temperature)``, ``(batch, response)`` float32 each.
    """
    logprobs, entropy, certainty = _from_one_softmax([_entropy, certainty_of], logits, ids, temperature)
    return logprobs, entropy, certainty


def _from_one_softmax(
    functions: Sequence[Callable[[Tensor], Tensor]], logits: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """The tokens' log-probabilities and functions of all log-probabilities of their positions, a block at a time."""

    def found(block: Tensor, own: Tensor) -> Tensor:
        logprobs = (block.float() / temperature).log_softmax(dim=-1)
        chosen = logprobs.gather(-1, own[:, None])[:, 0]
        return torch.stack([chosen, *(function(logprobs) for function in functions)], dim=-1)

    return _by_blocks(found, logits, ids).unbind(dim=-1)


def _logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return -functional.cross_entropy(logits.float() / temperature, ids, reduction="none")


def _entropy(logprobs: Tensor) -> Tensor:
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
    """Log-ratio between the scored policy and the distribution the token was really drawn from.

    Top-p, top-k, a minimum length and the model's generation config forbid tokens, so the sampler is ``policy / mass of the
    allowed tokens``. The ratio ``policy / sampler`` of an allowed token is that mass, at most 1; the loss weighs each token
    by it (importance sampling), so that the gradient is the scored policy's.

    Args:
        logits: ``(batch, response, vocabulary)``.
        ids: ``(batch, response)`` int64, the sampled tokens.
        sampling: the filters.
        stop_ids: tokens forbidden in the first ``min_new_tokens`` positions.
        generation: tokens that the model's generation config forbids everywhere, or as the first.

    Returns:
        ``(batch, response)`` float32, <= 0; 0 everywhere without filters. A few positions are done at a time.
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


def self_certainty(logits: Tensor) -> Tensor:
    """KL(U || p) of the softmax p of the logits, U uniform over the vocabulary.

    ``KL(U || p) = -log V - mean_v log p_v`` (arXiv 2505.19590, equation 5).

    Args:
        logits: ``(..., vocab)``, any floating dtype, all finite.

    Returns:
        ``(...)`` float32 >= 0, nats.
    """
    return certainty_of(logits.float().log_softmax(dim=-1))


def certainty_of(logprobs: Tensor) -> Tensor:
    """The same of log-probabilities, ``(..., vocab)`` float32, all finite: ``-mean_v log p_v - log V``, ``(...)``."""
    certainty = -logprobs.mean(dim=-1) - math.log(logprobs.shape[-1])
    return certainty.clamp(min=0.0)  # Rounding can push a uniform distribution below 0.
