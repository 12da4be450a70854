"""Per-token statistics of next-token distributions: log-probability, entropy, what sampling filters changed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TopKLogitsWarper, TopPLogitsWarper

from cagsr.config import SamplingConfig


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under the softmax of ``logits / temperature``.

    Args:
        logits: ``(batch, response, vocabulary)``, any float dtype.
        ids: ``(batch, response)`` int64.
        temperature: > 0; the one the answers were sampled at (method.md, section 5).

    Returns:
        ``(batch, response)`` float32, differentiable. Only the chosen column of the log-softmax is kept.
    """
    scaled = logits.float() / temperature
    flat = functional.cross_entropy(scaled.flatten(0, 1), ids.flatten(), reduction="none")
    return -flat.view(ids.shape)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of each next-token distribution ``softmax(logits / temperature)``.

    Args:
        logits: ``(batch, response, vocabulary)``.
        temperature: > 0.

    Returns:
        ``(batch, response)`` float32, nats, differentiable.
    """
    logprobs = functional.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def sampling_correction(logits: Tensor, ids: Tensor, sampling: SamplingConfig, stop_ids: tuple[int, ...]) -> Tensor:
    """Log-ratio between the scored policy and the distribution the token was really drawn from.

    Top-p, top-k and a minimum length forbid tokens, so the sampler is ``policy / mass of the allowed tokens``. The ratio
    ``policy / sampler`` of an allowed token is that mass, at most 1; the loss weighs each token by it (importance
    sampling), so that the gradient is the scored policy's.

    Args:
        logits: ``(batch, response, vocabulary)``.
        ids: ``(batch, response)`` int64, the sampled tokens.
        sampling: the filters.
        stop_ids: tokens forbidden in the first ``min_new_tokens`` positions.

    Returns:
        ``(batch, response)`` float32, <= 0; 0 everywhere without filters.
    """
    if sampling.top_p >= 1.0 and sampling.top_k == 0 and sampling.min_new_tokens == 0:
        return torch.zeros(ids.shape, device=ids.device)
    scaled = logits.float() / sampling.temperature
    filtered = scaled.clone()
    if sampling.min_new_tokens:
        filtered[:, : sampling.min_new_tokens, list(stop_ids)] = -torch.inf
    flat = filtered.flatten(0, 1)
    unused = ids.new_empty(0)
    if sampling.top_k:
        flat = TopKLogitsWarper(top_k=sampling.top_k)(unused, flat)
    if sampling.top_p < 1.0:
        flat = TopPLogitsWarper(top_p=sampling.top_p)(unused, flat)
    allowed = flat.view_as(scaled)
    log_mass = torch.logsumexp(allowed, dim=-1) - torch.logsumexp(scaled, dim=-1)
    return log_mass.clamp(max=0.0)
