"""Whitening over real tokens, across processes."""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a small tensor over all processes, as ``lambda x: accelerator.reduce(x, "sum")``."""

VARIANCE_EPS = 1e-8
"""Added to the variance, as in "The N+ Implementation Details of RLHF with PPO" (Huang et al., 2024)."""


def masked_moments(values: Tensor, mask: Tensor, reduce: Reduce | None = None) -> tuple[float, float, float]:
    """Count, mean and sample variance (n - 1) of the entries of ``values``, of any shape, that ``mask`` marks, over all processes.

    Mean 0 where there is no entry, variance 0 where there are fewer than two.
    """
    summed = reduce if reduce is not None else (lambda tensor: tensor)
    # float64, so that the result does not depend on padding, order or the number of processes; MPS has none.
    precision = torch.float32 if values.device.type == "mps" else torch.float64
    real = torch.where(mask, values.detach(), torch.zeros_like(values)).to(precision)
    count, total = (float(x) for x in summed(torch.stack([mask.sum().to(precision), real.sum()])))
    mean = total / max(count, 1.0)
    squares = torch.where(mask, (real - mean).square(), torch.zeros_like(real)).sum()
    variance = float(summed(squares[None])[0]) / max(count - 1.0, 1.0)
    return count, mean, variance


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce | None = None) -> Tensor:
    """Bring real entries to standard deviation 1 and, with ``shift_mean``, to mean 0.

    ``(x - mean) / sqrt(var + 1e-8)``, plus the mean again without ``shift_mean`` (Huang et al., 2024, detail "reward
    whitening without shifting the mean"). Float32 of the shape of ``values``, 0 on masked entries; fewer than two real
    entries have no spread to divide by: they are returned as they are.
    """
    values = torch.where(mask, values.float(), 0.0)
    count, mean, variance = masked_moments(values, mask, reduce)
    if count < 2:
        return values
    whitened = (values - mean) * (variance + VARIANCE_EPS) ** -0.5
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def unit_scale(values: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Divide real entries by their standard deviation; 0 stays 0. Arguments and guards as in :func:`whiten`.

    For advantages that are centred within each group already: moving their mean would push the answers of a group in
    which all were equally good.
    """
    values = torch.where(mask, values.float(), 0.0)
    count, _, variance = masked_moments(values, mask, reduce)
    return values if count < 2 else values * (variance + VARIANCE_EPS) ** -0.5
