"""The KL divergence to the frozen starting model: estimators and the controller of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cagsr.config import PPOConfig

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus or minus this (nats) before anything is made of them, so that exp can't overflow."""


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) per token as ``log p - log q``: unbiased, of either sign.

    k1 of Schulman, "Approximating KL divergence" (2020), for tokens sampled from the policy p; q is the frozen model.
    Log-probabilities ``(batch, response)`` in; nats out, clamped to plus or minus 20.
    """
    return (logprobs - reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) per token as ``q/p - 1 - log(q/p)``: unbiased, never negative, less variance.

    k3 of Schulman (2020), arguments as in :func:`kl_k1`; nats, >= 0.
    """
    log_ratio = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def kl_estimate(estimator: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    """:func:`kl_k3` or :func:`kl_k1` by its name in the settings."""
    return kl_k3(logprobs, reference) if estimator == "k3" else kl_k1(logprobs, reference)


@dataclass
class KLController:
    """The weight of the KL penalty, fixed or moved towards a target (Ziegler et al., 2019, arXiv 1909.08593, 2.2)."""

    kl_coef: float
    """The weight now."""
    kind: Literal["fixed", "adaptive"] = "fixed"
    target_kl: float = 6.0
    """adaptive: KL per sequence to aim at, nats."""
    horizon: int = 10000
    """adaptive: sequences over which the weight adapts."""

    @classmethod
    def build(cls, config: PPOConfig) -> KLController:
        """Make the configured controller."""
        return cls(config.kl_coef, config.kl_controller, config.target_kl, config.horizon)

    def update(self, kl: float, sequences: int) -> float:
        """Move the weight after a batch of ``sequences`` (of all processes) of mean KL per sequence ``kl``, nats, and return it.

        ``coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * sequences / horizon``; a fixed weight stays.
        """
        if self.kind == "adaptive":
            error = min(max(kl / self.target_kl - 1.0, -0.2), 0.2)
            self.kl_coef *= 1.0 + error * sequences / self.horizon
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """Return what changes during a run, JSON-able."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weight of :meth:`state_dict`."""
        self.kl_coef = float(state["kl_coef"])
