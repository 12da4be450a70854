"""What is logged of a reward: every term alone, its share of the variance, its correlation with length."""

import math

import torch
from torch import Tensor

from cagsr.flow import Returns


def within_group_correlation(x: Tensor, y: Tensor, group: Tensor) -> float:
    """Pearson correlation of two values after centring both within each group: what a policy gradient sees.

    All ``(batch,)``: rows with a NaN are left out, ``group`` is equal for answers to the same prompt. 0.0 where either does not
    vary within any group.
    """
    known = torch.isfinite(x) & torch.isfinite(y)
    x, y, group = x[known].cpu().double(), y[known].cpu().double(), group[known].cpu()
    if len(x) < 2:
        return 0.0
    _, index = torch.unique(group, return_inverse=True)
    size = torch.bincount(index).double()

    def centred(values: Tensor) -> Tensor:
        mean = torch.zeros_like(size).scatter_add(0, index, values) / size
        deviation = values - mean[index]
        # Values equal up to float32 rounding do not vary.
        return torch.where(deviation.abs() > 1e-6 * values.abs(), deviation, 0.0)

    dx, dy = centred(x), centred(y)
    norm = float(dx.norm() * dy.norm())
    return max(-1.0, min(1.0, float(dx @ dy) / norm)) if norm > 0 else 0.0


def variance_share(contribution: Tensor, total: Tensor) -> float:
    """Share of the variance of ``total`` that a summand brings, ``cov(contribution, total) / var(total)``.

    The shares of all summands sum to 1; one that works against the rest has a negative share. Both ``(batch,)``; 0.0
    where the total does not vary.
    """
    total, summand = total.cpu().double(), contribution.cpu().double()
    centred = total - total.mean()
    variance = float(centred @ centred)
    return float((summand - summand.mean()) @ centred) / variance if variance > 1e-12 else 0.0


def flat_share(values: Tensor, group: Tensor) -> float:
    """Share of the groups of two answers or more in which all are worth the same, up to rounding (TRL: frac_reward_zero_std).

    Both ``(batch,)``, ``group`` equal for answers to a prompt; rows with a NaN are left out. 0.0 where no group has two.
    """
    known = torch.isfinite(values)
    values, group = values[known].cpu().double(), group[known].cpu()
    found = [own for number in torch.unique(group) if len(own := values[group == number]) > 1]
    flat = [float(own.max() - own.min()) <= 1e-6 * float(own.abs().max()) for own in found]
    return sum(flat) / len(flat) if flat else 0.0


def best_of_gain(signal: Tensor, reward: Tensor, group: Tensor, n: int) -> float:
    """How much more of a ``signal`` the best of ``n`` answers by ``reward`` has than an average one, in standard deviations of it.

    All ``(batch,)``: rows with a NaN are left out, ``group`` is equal for answers to a prompt. The mean over all choices of n of a
    prompt's answers, prompts with fewer left out; the deviation is that within prompts. How fast the gain falls as n grows is how
    fast the reward's tail leaves the signal behind (Gao et al., 2023, "Scaling laws for reward model overoptimization"). 0.0
    where the signal does not vary.
    """
    known = torch.isfinite(signal) & torch.isfinite(reward)
    signal, reward, group = signal[known].cpu().double(), reward[known].cpu().double(), group[known].cpu()
    gains, squares, count = [], 0.0, 0
    for number in torch.unique(group).tolist():
        own = group == number
        values, size = signal[own] - signal[own].mean(), int(own.sum())
        squares, count = squares + float(values @ values), count + size - 1
        if size >= n:
            # The answer at place i of the ascending order is the best of comb(i, n - 1) of all comb(size, n) choices.
            chances = torch.tensor([math.comb(place, n - 1) / math.comb(size, n) for place in range(size)]).double()
            worth, order = reward[own].sort(stable=True)
            # Of equals each is as often the best one.
            _, equal, many = torch.unique_consecutive(worth, return_inverse=True, return_counts=True)
            shared = torch.zeros(len(many), dtype=torch.float64).index_add_(0, equal, chances) / many
            gains.append(float(values[order] @ shared[equal]))
    deviation = math.sqrt(squares / count) if count else 0.0
    return sum(gains) / len(gains) / deviation if gains and deviation > 1e-12 else 0.0


def reward_metrics(returns: Returns, length: Tensor, group: Tensor) -> dict[str, float]:
    """Describe a reward for the log; with several processes hand in the answers of all of them.

    For each term and for ``total``: ``rewards/<name>/mean`` and ``/std`` (population) of the raw values over the
    answers the term applies to, ``/length_correlation`` (within the answers to one prompt, by ``length`` in tokens); for each
    term ``/share`` of the total's variance; for each that is watched and not paid ``/agreement``, its correlation with the total
    within prompts, and ``/gain_2`` and ``/gain_all``, what the best of two and the best of all answers to a prompt have of it
    (:func:`best_of_gain`); ``rewards/total/flat``, the share of prompts whose answers are all worth the same. All are finite; a
    term that applies to no answer gives zeros.
    """
    metrics = {"rewards/total/flat": flat_share(returns.total, group)}
    for name, values in {**returns.terms, "total": returns.total}.items():
        known = values[torch.isfinite(values)].cpu().double()
        metrics[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else 0.0
        metrics[f"rewards/{name}/std"] = float(known.std(correction=0)) if len(known) else 0.0
        metrics[f"rewards/{name}/length_correlation"] = within_group_correlation(values, length, group)
        if name in returns.contributions:
            metrics[f"rewards/{name}/share"] = variance_share(returns.contributions[name], returns.total)
        elif name != "total":
            metrics[f"rewards/{name}/agreement"] = within_group_correlation(values, returns.total, group)
            largest = int(torch.unique(group, return_counts=True)[1].max()) if len(group) else 0
            for label, n in (("2", 2), ("all", largest)):
                metrics[f"rewards/{name}/gain_{label}"] = best_of_gain(values, returns.total, group, n)
    return metrics
