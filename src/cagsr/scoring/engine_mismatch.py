"""How far the log-probabilities of whoever sampled are from the scoring pass's, and what the loss makes of it.

An engine computes with other kernels, often in another precision, so it samples from a slightly other distribution than
the policy that is scored. The difference is measured at every step; the loss can weigh each token by
``min(policy / engine, cap)`` (truncated importance sampling; Yao et al., "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training", 2025), as TRL's ``vllm_importance_sampling_correction`` does.

Our own decoding is the same model, but token by token with a key-value cache. Where that is another policy than one pass
over the answer, nothing corrects it: a run says so and stops.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cagsr.config import RolloutConfig
from cagsr.errors import RolloutError
from cagsr.flow import EpisodeBatch, Readings

OWN_LIMIT = {torch.float32: 0.05, torch.bfloat16: 0.5}
"""Mean difference, nats a token, above which our own decoding is no rounding error away from the scoring pass."""


def account_for_engine(
    readings: Readings, episodes: EpisodeBatch, config: RolloutConfig, gather: Callable[[Tensor], Tensor]
) -> tuple[Readings, dict[str, float]]:
    """Fold what an engine says about its answers into the scoring pass's readings, and measure how far it is from them.

    ``config`` has whether to correct, the cap, and the largest mean difference borne (above it: RolloutError); ``gather``
    puts the tensors of all processes, ``(n,)`` each, behind each other. Gives the readings (``sampling_correction``
    replaced if asked for) and metrics of all processes together by TRL's names; without an engine the readings as they
    were, and no metrics.
    """
    engine = episodes.sampler_logprobs
    if engine is None:
        return readings, {}
    mask = episodes.sampled
    ratios = importance_ratio(readings.logprobs, engine, mask, config.importance_sampling_cap)
    ratio = ratios[mask]
    mean, largest, more = _difference(readings, engine, mask, gather, [ratio.sum(), ratio.min(), ratio.max()])
    total, lowest, highest, tokens = more
    metrics = {
        "sampling/sampling_logp_difference/mean": mean,
        "sampling/sampling_logp_difference/max": largest,
        "sampling/importance_sampling_ratio/min": float(lowest.min()),
        "sampling/importance_sampling_ratio/mean": float(total.sum() / tokens.sum()),
        "sampling/importance_sampling_ratio/max": float(highest.max()),
    }
    if config.max_logp_difference and not mean <= config.max_logp_difference:
        raise RolloutError(
            f"The engine's log-probabilities differ from the scoring pass's by {mean:.2g} nats a token, above "
            f"--rollout.max_logp_difference {config.max_logp_difference:g}: the server holds another model than the policy, "
            "or was not started as docs/rollouts.md says."
        )
    if not config.importance_sampling_correction:
        return readings, metrics
    return replace(readings, sampling_correction=ratios.log()), metrics


def decoding_metrics(
    readings: Readings, episodes: EpisodeBatch, limit: float, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Measure how far our own decoding is from the scoring pass; arguments as :func:`account_for_engine`.

    ``limit`` is the largest mean difference borne, nats a token (above it: RolloutError); 0: any. Gives mean and largest
    difference under the names that an engine's have; nothing where an engine sampled.
    """
    if episodes.decoded_logprobs is None:
        return {}
    drawn = episodes.sampled if episodes.given is None else episodes.sampled & ~episodes.given[:, None]
    mean, largest, _ = _difference(readings, episodes.decoded_logprobs, drawn, gather, [])
    if limit and not mean <= limit:
        raise RolloutError(
            f"The answers were drawn at log-probabilities {mean:.2g} nats a token away from those of the scoring pass (limit "
            f"{limit:g}): token by token with a key-value cache this model is another than in one pass over prompt and "
            "answer, so it would learn from answers that are not its own; sample through --rollout.engine vllm, which corrects "
            "for it, or go on all the same with --rollout.max_logp_difference 0."
        )
    return {
        "sampling/sampling_logp_difference/mean": beyond_rounding(mean),
        "sampling/sampling_logp_difference/max": beyond_rounding(largest),
    }


def _difference(
    readings: Readings, drawn: Tensor, mask: Tensor, gather: Callable[[Tensor], Tensor], more: list[Tensor]
) -> tuple[float, float, tuple[Tensor, ...]]:
    """Mean and largest difference of all processes' tokens, and of each process ``more`` scalars and its tokens' number."""
    # What the filters (top-p, minimum length, ...) do is known and no mismatch: compare with our own sampler.
    difference = (readings.logprobs - readings.sampling_correction - drawn).abs()[mask]
    own = torch.stack([difference.sum(), difference.max(), *more, mask.sum().to(difference.dtype)])
    total, largest, *rest = gather(own).view(-1, len(own)).unbind(dim=1)
    return float(total.sum() / rest[-1].sum()), float(largest.max()), tuple(rest)


def beyond_rounding(difference: float) -> float:
    """A difference of two passes' log-probabilities as it is logged: to five decimals.

    What lies below, some 1e-7 nats, is float32 rounding of products of other shapes. It differs from process to process
    (memory alignment decides the order of sums), and a resumed run's metrics must be those of one never stopped.
    """
    return round(difference, 5)


def importance_ratio(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Weight of each token: its probability under the scored policy over that under the engine, at most ``cap`` (>= 1).

    All ``(batch, response)``; the ratio is float32, > 0, and 1 on padding.
    """
    return (logprobs - engine_logprobs).masked_fill(~mask, 0.0).clamp(max=math.log(cap)).exp()
