"""One scale for the terms of a reward: the running moments of each term, and what a value is on their scale.

Everything that judges answers by a reward goes through here: training, ``rank``, ``score``, ``view``, ``diagnose``,
``compare`` and TRL's trainers. What a run learned is kept with it (``runs/reward.py``), so that an answer is worth the same
whatever else is in the file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cagsr.errors import RunError
from cagsr.reward.settings import TERMS
from cagsr.reward.values import TermValues

Normalization = Literal["within_prompt", "running", "none"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a small tensor, on the batch's device, over all processes: ``lambda x: accelerator.reduce(x, "sum")``."""
FIXED = {term.name: term.scale for term in TERMS if term.scale is not None}
"""The terms that have a scale of their own."""


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of all values seen (Welford, 1962; Chan, Golub & LeVeque, 1979)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def merge(self, count: float, mean: float, m2: float) -> None:
        """Add a group of values, given by its count, mean and sum of squared deviations from that mean.

        The order of the groups, and how the values were cut into groups, changes nothing but rounding.
        """
        if count == 0:
            return
        both = self.count + count
        shift = mean - self.mean
        self.m2 += m2 + shift * shift * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    @property
    def std(self) -> float:
        """Standard deviation of all values seen (dividing by their number); 0 before the first."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0


def group_deviations(values: Tensor, applies: Tensor, group: Tensor) -> tuple[Tensor, float]:
    """Deviation of each value ``(batch,)`` from the mean of its group, over the values that apply.

    ``(batch,)`` float64 on the CPU, 0 where the value does not apply; and the degrees of freedom: values that apply less
    groups that have any.
    """
    known, own = applies.cpu(), torch.unique(group.cpu(), return_inverse=True)[1]
    x = torch.where(known, values.cpu().double(), 0.0)
    size = int(own.max()) + 1 if len(own) else 0
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, own, known.double())
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, own, x)
    deviation = torch.where(known, x - (total / count.clamp(min=1))[own], 0.0)
    return deviation, float(known.sum() - (count > 0).sum())


class Normalizer:
    """Brings each term of a reward to one scale.

    ``normalize``: ``within_prompt`` centres a value on the mean over the answers to its prompt and divides it by the term's
    standard deviation within prompts, so that weights compare what a policy gradient can follow. An answer without another
    one to its prompt is centred on the mean of all answers seen and is not clipped: between two answers to one prompt the
    difference is the same, however they come. ``running`` centres and divides by mean and standard deviation over all
    answers; ``none`` takes raw values.

    Normalised values are clipped to plus or minus ``clip``; 0 does not clip. ``reduce`` sums over processes, so that the
    moments are those of all of them; None for one process.
    """

    def __init__(
        self, names: Sequence[str], normalize: Normalization, clip: float = 5.0, reduce: Reduce | None = None
    ) -> None:
        self.names = tuple(names)
        self.normalize = normalize
        self.clip = clip
        self._reduce = reduce
        self.moments = {name: Moments() for name in self.names}
        self.within = {name: Moments() for name in self.names}
        """Deviations from the mean of the same prompt's answers; ``count`` is their degrees of freedom."""

    def update(self, values: Mapping[str, TermValues], group: Tensor | Sequence[Tensor]) -> None:
        """Take the values of one process's answers, by name, into the moments.

        ``group`` ``(batch,)`` int64 is equal for answers that are compared, those to one prompt; prompts never span processes.
        Or one for each term, in their order.
        """
        groups = [group] * len(self.names) if isinstance(group, Tensor) else list(group)
        seen = [values[name].total[values[name].applies].cpu().double() for name in self.names]
        compared = zip(self.names, groups, strict=True)
        deviations = [group_deviations(values[name].total, values[name].applies, own) for name, own in compared]
        sums = torch.tensor(
            [
                [float(len(x)), float(x.sum()), freedom, float(d.square().sum())]
                for x, (d, freedom) in zip(seen, deviations, strict=True)
            ],
            dtype=torch.float64,
        )
        counts, totals, freedoms, within = self.summed(sums, groups[0].device).unbind(dim=1)
        means = totals / counts.clamp(min=1)
        # The deviations are taken from the mean of all processes, so that their squares can simply be summed.
        squares = [float((x - mean).square().sum()) for x, mean in zip(seen, means, strict=True)]
        m2 = self.summed(torch.tensor(squares, dtype=torch.float64), groups[0].device)
        for index, name in enumerate(self.names):
            self.moments[name].merge(float(counts[index]), float(means[index]), float(m2[index]))
            self.within[name].merge(float(freedoms[index]), 0.0, float(within[index]))

    def summed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Sum a small tensor over all processes, in float64 where the device has it; the result is on the CPU."""
        if self._reduce is None:
            return tensor
        return self._reduce(tensor.to(device, torch.float32 if device.type == "mps" else torch.float64)).double().cpu()

    def scale(self, name: str) -> float:
        """Return the factor that brings a term to the common scale, or the term's own; 0 for a term that does not vary."""
        if self.normalize == "none":
            return 1.0
        if name in FIXED:
            return FIXED[name]
        # Where no prompt had two answers the deviation over all of them is all there is.
        whole = self.normalize == "running" or self.within[name].count == 0
        std = (self.moments if whole else self.within)[name].std
        # Values that do not vary beyond float32 rounding: dividing by their deviation would blow up noise. The mean of all
        # values says what counts as rounding; that of deviations is 0.
        noise = 1e-6 * abs(self.moments[name].mean) + 1e-8
        return 0.0 if std <= noise else 1.0 / std

    def __call__(self, name: str, values: TermValues, group: Tensor) -> Tensor:
        """Bring one term's values to the scale: ``(batch,)`` of their dtype, 0 where the term does not apply or does not vary."""
        if self.normalize == "none":
            return values.total
        scale, mean = self.scale(name), self.moments[name].mean
        amount = (values.total - mean) * scale
        clipped = amount.clamp(-self.clip, self.clip) if self.clip > 0 else amount
        if self.normalize == "within_prompt":
            deviations, _ = group_deviations(values.total, values.applies, group)
            among = deviations.to(amount.device, amount.dtype) * scale
            among = among.clamp(-self.clip, self.clip) if self.clip > 0 else among
            _, own, counts = torch.unique(group, return_inverse=True, return_counts=True)
            clipped = torch.where(counts[own] == 1, amount, among)
        return torch.where(values.applies, clipped, 0.0)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the moments as JSON-able floats, exact: name -> count, mean, m2 and those within prompts."""
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
        """Take over the moments of :meth:`state_dict`; RunError where they are those of other terms."""
        if set(state) != set(self.names):
            raise RunError(
                f"the run's scales are those of the reward terms {sorted(state)}, but this reward has "
                f"{sorted(self.names)}: use the reward the run was started with"
            )
        for name in self.names:
            kept = {key: float(x) for key, x in state[name].items()}
            self.moments[name] = Moments(kept["count"], kept["mean"], kept["m2"])
            self.within[name] = Moments(kept["within_count"], 0.0, kept["within_m2"])
