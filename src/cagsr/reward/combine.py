"""The reward: each term normalised, weighted, summed, and paid at the tokens it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cagsr.errors import CagsrError, ConfigError, RewardError, RunError
from cagsr.flow import Reward, RewardBatch
from cagsr.reward.metrics import reward_metrics
from cagsr.reward.moments import Moments, group_deviations
from cagsr.reward.pay import add_at_last_token
from cagsr.reward.protocol import RewardTerm
from cagsr.reward.values import TermValues, term_values

__all__ = ["Reduce", "RewardFunction", "reward_metrics"]

Reduce = Callable[[Tensor], Tensor]
"""Sums a small tensor, on the batch's device, over all processes: ``lambda x: accelerator.reduce(x, "sum")``."""


class RewardFunction:
    """A weighted sum of terms, each brought to one scale by its running moments over the run (peers.md, 5.15)."""

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        weights: Sequence[float],
        normalize: Literal["within_prompt", "running", "none"],
        clip: float = 5.0,
        reduce: Reduce | None = None,
    ) -> None:
        """Bind the terms.

        Args:
            terms: the terms, each with a name of its own.
            weights: one weight for each term.
            normalize: ``within_prompt`` centres each term on its mean over the answers to the same prompt and divides
                it by its standard deviation within prompts over the run, so that weights compare what a policy
                gradient can follow; ``running`` centres and divides by mean and standard deviation over all answers
                of the run; ``none`` takes raw values.
            clip: normalised values are clipped to plus or minus this; 0 does not clip. Raw values are never clipped.
            reduce: sums over processes, so that the moments are those of all processes; None for one process.

        Raises:
            ConfigError: no term, two terms of one name, or another number of weights than terms.
        """
        if not terms:
            raise ConfigError("the reward has no term: give at least one term a weight other than 0")
        if len(terms) != len(weights):
            raise ConfigError(f"the reward has {len(terms)} terms but {len(weights)} weights: give one for each term")
        self.names = tuple(term.name for term in terms)
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ConfigError(f"two reward terms are called {sorted(twice)[0]!r}: give each a name of its own")
        self.terms = tuple(terms)
        self.weights = tuple(float(weight) for weight in weights)
        self.normalize = normalize
        self.clip = clip
        self.reduce = reduce
        self.moments = {name: Moments() for name in self.names}
        self.within = {name: Moments() for name in self.names}
        """Deviations from the mean of the same prompt's answers; ``count`` is their degrees of freedom."""

    def __call__(self, batch: RewardBatch, *, update: bool = True) -> Reward:
        """Compute the reward of a batch.

        Args:
            batch: the answers and everything known of them.
            update: take the batch into the running moments first (training); False leaves them as they are and
                exchanges nothing between processes (evaluation). Before the first update every term counts 0.

        Returns:
            The reward. A term without variance contributes 0; where a term does not apply to an answer its raw value
            is NaN and it contributes 0. Rows of ``per_token`` sum to ``total``, except that an answer without tokens
            is paid nothing on tokens.

        Raises:
            RewardError: a term fails or gives a number that is not finite (the moments are then unchanged).
            ConfigError: ``within_prompt`` and no prompt has two answers.
        """
        mask, group = batch.rollout.response_mask, batch.rollout.prompts.group
        if self.normalize == "within_prompt" and len(torch.unique(group)) == len(group):
            raise ConfigError(
                "reward.normalize within_prompt compares the answers to one prompt and there is one answer each: "
                "use --reward.normalize running, or sample more with --sampling.num_generations"
            )
        values = self._values(batch, update)
        if update:
            self._update(values, group)
        total = torch.zeros(mask.shape[0], dtype=torch.float32, device=mask.device)
        per_token = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        contributions: dict[str, Tensor] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            term = values[name]
            amount, scale = self._normalized(name, term, group)
            # Dense gains keep their place, scaled; the centring and the clipping of the sum fall on the last token.
            tokens = torch.zeros_like(per_token) if term.tokens is None else term.tokens * scale
            tokens = add_at_last_token(tokens, amount - tokens.sum(dim=1), mask)
            contributions[name] = weight * amount
            total = total + contributions[name]
            per_token = per_token + weight * tokens
        raw = {name: value.raw for name, value in values.items()}
        return Reward(total=total, per_token=per_token, terms=raw, contributions=contributions)

    def _values(self, batch: RewardBatch, update: bool) -> dict[str, TermValues]:
        failure: CagsrError | None = None
        values: dict[str, TermValues] = {}
        try:
            values = {term.name: term_values(term, batch) for term in self.terms}
        except CagsrError as error:
            failure = error
        # All processes learn of a failure together: one that raised alone would leave the others waiting for ever.
        failed = torch.tensor([float(failure is not None)])
        if update and float(self._summed(failed, batch.rollout.response_mask.device)) > 0:
            failure = failure or RewardError("a reward term failed on another process: its message names the term")
        if failure is not None:
            raise failure
        return values

    def _summed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Sum a small tensor over all processes, in float64 where the device has it; the result is on the CPU."""
        if self.reduce is None:
            return tensor
        return self.reduce(tensor.to(device, torch.float32 if device.type == "mps" else torch.float64)).double().cpu()

    def _update(self, values: Mapping[str, TermValues], group: Tensor) -> None:
        seen = [value.total[value.applies].cpu().double() for value in values.values()]
        # Prompts never span processes, so deviations from their means are summed as they are.
        deviations = [group_deviations(value.total, value.applies, group) for value in values.values()]
        sums = torch.tensor(
            [
                [float(len(x)), float(x.sum()), freedom, float(d.square().sum())]
                for x, (d, freedom) in zip(seen, deviations, strict=True)
            ],
            dtype=torch.float64,
        )
        counts, totals, freedoms, within = self._summed(sums, group.device).unbind(dim=1)
        means = totals / counts.clamp(min=1)
        # The deviations are taken from the mean of all processes, so that their squares can simply be summed.
        squares = [float((x - mean).square().sum()) for x, mean in zip(seen, means, strict=True)]
        m2 = self._summed(torch.tensor(squares, dtype=torch.float64), group.device)
        for index, name in enumerate(values):
            self.moments[name].merge(float(counts[index]), float(means[index]), float(m2[index]))
            self.within[name].merge(float(freedoms[index]), 0.0, float(within[index]))

    def scale(self, name: str) -> float:
        """Return the factor that brings a term to the common scale; 0 for a term that does not vary."""
        if self.normalize == "none":
            return 1.0
        if self.normalize == "running":
            return 0.0 if self.moments[name].constant else 1.0 / self.moments[name].std
        # The mean of all values says what counts as rounding; that of deviations is 0.
        noise = 1e-6 * abs(self.moments[name].mean) + 1e-8
        std = self.within[name].std
        return 0.0 if std <= noise else 1.0 / std

    def _normalized(self, name: str, term: TermValues, group: Tensor) -> tuple[Tensor, float]:
        """Return the ``(batch,)`` normalised values and the factor that brings a dense gain to their scale."""
        if self.normalize == "none":
            return term.total, 1.0
        scale = self.scale(name)
        if self.normalize == "within_prompt":
            deviations, _ = group_deviations(term.total, term.applies, group)
            amount = deviations.to(term.total.device, torch.float32) * scale
        else:
            amount = (term.total - self.moments[name].mean) * scale
        if self.clip > 0:
            amount = amount.clamp(-self.clip, self.clip)
        return torch.where(term.applies, amount, 0.0), scale

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the running moments as JSON-able floats, exact: name -> count, mean, m2 and those within prompts."""
        return {
            name: {
                "count": m.count,
                "mean": m.mean,
                "m2": m.m2,
                "within_count": self.within[name].count,
                "within_m2": self.within[name].m2,
            }
            for name, m in self.moments.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the moments of :meth:`state_dict`.

        Raises:
            RunError: they are those of other terms.
        """
        if set(state) != set(self.names):
            raise RunError(
                f"the checkpoint holds running moments of the reward terms {sorted(state)}, but this reward has "
                f"{sorted(self.names)}: resume with the reward the run was started with"
            )
        for name in self.names:
            kept = {key: float(x) for key, x in state[name].items()}
            self.moments[name] = Moments(kept["count"], kept["mean"], kept["m2"])
            self.within[name] = Moments(kept["within_count"], 0.0, kept["within_m2"])
