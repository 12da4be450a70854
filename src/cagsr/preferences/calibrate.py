"""Weights of the reward's terms from a handful of judgements.

A reward model that is trained on people's pairs learns first of all how long the answers are that they prefer. Here the judgements
fit nothing but the weights of the terms that the reward has, and are drawn towards the weights that it has without them: logistic
regression on the terms' differences within a pair (Bradley & Terry, 1952), with a normal prior around a multiple of
those weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

SMALL = 0.1
"""A term that the reward does not have gets a weight only from this share of the largest one on."""


def calibrated(differences: Floats, prior: Floats, shrinkage: float) -> Floats:
    """``(terms,)`` weights by :func:`fit_weights`, once with all terms and again without the new ones that come out ``SMALL``."""
    first = fit_weights(differences, prior, shrinkage)
    kept = (prior != 0) | (np.abs(first) >= SMALL * np.abs(first).max())
    weights = np.zeros_like(first)
    weights[kept] = fit_weights(differences[:, kept], prior[kept], shrinkage)
    return weights


def fit_weights(differences: Floats, prior: Floats, shrinkage: float) -> Floats:
    """``(terms,)`` weights w that make ``sum log sigmoid(differences . w) - shrinkage / 2 |w - s prior|^2`` largest, s >= 0.

    Args:
        differences: ``(pairs, terms)`` of the better answer's normalised terms less the worse one's.
        prior: ``(terms,)`` weights without a judgement; only their direction counts, s is fitted.
        shrinkage: how many judgements they count as, about.
    """
    terms = len(prior)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        weights, scale = parameters[:terms], parameters[terms]
        margin, away = differences @ weights, weights - scale * prior
        lost = np.exp(-np.logaddexp(0.0, margin))  # 1 - sigmoid
        gradient = shrinkage * away - differences.T @ lost
        value = np.logaddexp(0.0, -margin).sum() + shrinkage / 2 * away @ away
        return float(value), np.append(gradient, -shrinkage * prior @ away)

    bounds = [(None, None)] * terms + [(0.0, None)]
    return np.asarray(minimize(loss, np.append(prior, 1.0), jac=True, method="L-BFGS-B", bounds=bounds).x[:terms])


def cross_fitted(
    differences: Floats, prior: Floats, shrinkage: float, prompts: Sequence[str], folds: int = 10
) -> Floats:
    """``(pairs,)`` how far each pair's better answer is above the worse one by weights that saw no pair of its prompt."""
    known = sorted(set(prompts))
    place = dict(zip(known, np.random.default_rng(0).permutation(len(known)) % folds, strict=True))
    fold = np.array([place[one] for one in prompts])
    margins = np.zeros(len(differences))
    for number in np.unique(fold):
        out = fold == number
        margins[out] = differences[out] @ calibrated(differences[~out], prior, shrinkage)
    return margins


def as_strong_as(weights: Floats, prior: Floats, answers: Floats) -> Floats:
    """The weights, multiplied so that the reward's deviation within prompts stays that of the prior: leashes keep their meaning.

    ``answers`` ``(answers, terms)`` are normalised terms of sampled answers, centred on their prompts. Where the reward varies by
    none of the two, the weights as they are.
    """
    now, before = float((answers @ weights).std()), float((answers @ prior).std())
    return weights * before / now if now > 0 and before > 0 else weights


def agreement(margins: Floats) -> Floats:
    """``(pairs,)`` 1 where the better answer is above, 0.5 where they are equal, 0 where it is below."""
    return np.asarray(0.5 * (1.0 + np.sign(np.round(margins, 12))))
