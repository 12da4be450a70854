"""The mathematics behind ``examples.e2e.signals``: pure functions of tensors and words, tested by hand.

Shapes: ``heads`` single attention heads of all layers, ``batch`` answers, ``response`` and ``prompt`` token positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Expectation = Literal["mean", "linear", "log"]


def copying_rate(heads: Tensor, said: Tensor, mask: Tensor, asked: Tensor, usable: Tensor) -> Tensor:
    """How often the prompt token that a head looks at hardest is the token being said.

    Only positions count whose token stands in the prompt at all; others no head can copy.

    Args:
        heads: ``(heads, batch, response, prompt)`` attention, rows predict the response token.
        said: ``(batch, response)`` int64, the text id of each response token.
        mask: ``(batch, response)`` bool, real response tokens.
        asked: ``(batch, prompt)`` int64, the text id of each prompt token.
        usable: ``(batch, prompt)`` bool, prompt tokens that may be looked at (not padding, not the sink).

    Returns:
        ``(heads,)`` float64 in [0, 1]; zeros where no answer repeats a token of its prompt.
    """
    same = (said[:, :, None] == asked[:, None, :]) & usable[:, None, :]  # (batch, response, prompt)
    possible = same.any(dim=2) & mask
    looked = heads.masked_fill(~usable[None, :, None, :], -1.0).argmax(dim=3)  # (heads, batch, response)
    hit = same.expand(len(heads), -1, -1, -1).gather(3, looked[..., None])[..., 0] & possible
    return hit.sum(dim=(1, 2)).double() / possible.sum().clamp(min=1)


def head_weights(scores: Tensor) -> Tensor:
    """Weights of heads from their scores, ``(heads,)`` float64: the positive ones over their sum, else all alike."""
    positive = scores.double().clamp(min=0.0)
    total = float(positive.sum())
    return positive / total if total > 0 else torch.full_like(positive, 1 / len(positive))


def prompt_mass(heads: Tensor, mask: Tensor, sink: Tensor | None = None) -> Tensor:
    """Lookback: the share of each position's attention that is on the prompt (a row of attention sums to 1).

    Args:
        heads: ``(heads, batch, response, prompt)``.
        mask: ``(batch, response)`` bool.
        sink: ``(batch,)`` int64, the prompt token that takes attention without meaning; it is then left out of both sides.

    Returns:
        ``(heads, batch, response)`` in [0, 1], 0 on masked tokens.
    """
    mass = heads.sum(dim=3)
    if sink is not None:
        on_sink = heads.gather(3, sink[None, :, None, None].expand(*heads.shape[:3], 1))[..., 0]
        mass = (mass - on_sink) / (1 - on_sink).clamp(min=1e-6)
    return mass.clamp(0.0, 1.0) * mask


def expected_by_position(values: Tensor, mask: Tensor, how: Expectation, positions: int) -> Tensor:
    """What a value is at each response position on average, from answers to other prompts.

    Args:
        values: ``(heads, batch, response)``.
        mask: ``(batch, response)`` bool.
        how: ``mean``: the mean at that position (behind the longest answer: the last one known); ``linear`` and ``log``:
            the least-squares line over the position t = 0, 1, ... or over ln(1 + t).
        positions: how many positions are wanted.

    Returns:
        ``(heads, positions)`` float64.
    """
    x, known = values.double(), mask.double()
    if how == "mean":
        count = known.sum(dim=0)
        means = (x * known).sum(dim=1) / count.clamp(min=1)
        last = int((count > 0).nonzero().max())
        return means[:, torch.arange(positions).clamp(max=last)]

    def design(t: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(t), t if how == "linear" else torch.log1p(t)], dim=1)

    rows, places = mask.nonzero(as_tuple=True)
    line = torch.linalg.lstsq(design(places.double()), x[:, rows, places].T).solution  # (2, heads)
    return (design(torch.arange(positions).double()) @ line).T


def mean_residual(values: Tensor, mask: Tensor, expected: Tensor) -> Tensor:
    """Mean over an answer's tokens of value less what is expected at its position, ``(heads, batch)`` float64.

    Args:
        values: ``(heads, batch, response)``.
        mask: ``(batch, response)`` bool.
        expected: ``(heads, positions)``, at least as many positions as ``response``.
    """
    residual = (values.double() - expected[:, None, : values.shape[2]]) * mask
    return residual.sum(dim=2) / mask.sum(dim=1).clamp(min=1)


def within_centred(values: Floats) -> Floats:
    """Take each prompt's mean off, the last axis being the answers to one prompt."""
    return values - values.mean(axis=-1, keepdims=True)


def probe_weights(features: Floats, target: Floats, ridge: float = 0.1) -> Floats:
    """Ridge regression of a target on the heads, within prompts: weights for the raw features.

    ``min_w |t - sum_h w_h z_h|^2 / n + ridge |w|^2``, with ``t`` and ``z_h`` centred within prompts and scaled to 1. With the
    lookback ratio as feature this is the Lookback Lens (arXiv 2407.07071) on a target that is no label.

    Args:
        features: ``(heads, prompts, candidates)``.
        target: ``(prompts, candidates)``.
        ridge: as above.

    Returns:
        ``(heads,)`` float64; 0 for a head that does not vary.
    """
    x = within_centred(features).reshape(len(features), -1)
    y = within_centred(target).ravel()
    scale = x.std(axis=1)
    varies = scale > 1e-12
    weights = np.zeros(len(x))
    if varies.any() and y.std() > 0:
        z, t = x[varies] / scale[varies, None], y / y.std()
        solved = np.linalg.solve(z @ z.T / z.shape[1] + ridge * np.eye(len(z)), z @ t / z.shape[1])
        weights[varies] = solved / scale[varies]
    return weights


def slope(values: Floats, over: Floats) -> float:
    """Least-squares slope within prompts, both ``(prompts, candidates)``; 0 where ``over`` does not vary."""
    x, y = within_centred(over), within_centred(values)
    return float((x * y).sum() / (x * x).sum()) if (x * x).sum() > 0 else 0.0


def word_doubts(
    attention: Tensor, same: Tensor, salient: Tensor, logprobs: Tensor, words: Sequence[Sequence[int]], threshold: float
) -> dict[str, float]:
    """How doubtful the words of one answer are that are not copied from a prompt token which is looked at.

    A word is copied when one of its tokens pays at least ``threshold`` attention to an equal prompt token. Each other word has
    three doubts: ``entropy``, the normalised entropy of the attention over salient prompt tokens, mean over the word's
    tokens; ``peak``, 1 less the largest attention to one of them; ``surprise``, minus the log-probability of the word.

    Args:
        attention: ``(response, prompt)``.
        same: ``(response, prompt)`` bool, response and prompt token say the same and the latter may be looked at.
        salient: ``(prompt,)`` bool.
        logprobs: ``(response,)``.
        words: the tokens of each content word of the answer.
        threshold: as above.

    Returns:
        ``<doubt>, worst word`` (0 where every word is copied), ``<doubt>, mean`` over all content words, copied ones
        counting 0; ``words not copied``, their share, and ``words not in the prompt``, the share of those without a token of
        the prompt, looked at or not; all >= 0, zeros for an answer without a content word.
    """
    copied = torch.where(same, attention, 0.0).amax(dim=1) >= threshold
    looked = attention[:, salient]
    shares = looked / looked.sum(dim=1, keepdim=True).clamp(min=1e-12)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=1) / math.log(max(2, looked.shape[1]))
    peak = 1 - (looked.amax(dim=1) if looked.shape[1] else torch.zeros(len(attention)))
    doubts: dict[str, list[float]] = {"entropy": [], "peak": [], "surprise": []}
    for tokens in words:
        index = torch.tensor(list(tokens))
        if not bool(copied[index].any()):
            doubts["entropy"].append(float(entropy[index].mean()))
            doubts["peak"].append(float(peak[index].min()))
            doubts["surprise"].append(float(-logprobs[index].sum()))
    count = max(1, len(words))
    anywhere = same.any(dim=1)
    absent = sum(not bool(anywhere[list(tokens)].any()) for tokens in words)
    found = {"words not copied": len(doubts["peak"]) / count, "words not in the prompt": absent / count}
    for name, values in doubts.items():
        found[f"{name}, worst word"] = max(values, default=0.0)
        found[f"{name}, mean"] = sum(values) / count
    return found


def sibling_support(answers: Sequence[Collection[str]], weight: Mapping[str, float]) -> list[tuple[float, float]]:
    """How far the answers to one prompt agree, word by word (after SelfCheckGPT, arXiv 2303.08896).

    Args:
        answers: the words of each answer, two answers or more.
        weight: of each word; words not named weigh nothing.

    Returns:
        For each answer: the weighted mean, over its words, of the share of the *other* answers that say the word too; and
        the share that its words have of all that the others say, ``sum_v w_v share_v [v said] / sum_v w_v share_v``.
    """
    sets = [frozenset(word for word in words if weight.get(word, 0.0) > 0) for words in answers]
    counts = Counter(word for words in sets for word in words)
    others = len(sets) - 1
    found = []
    for said in sets:
        shares = {word: (count - (word in said)) / others for word, count in counts.items()}
        agreed = sum(weight[word] * shares[word] for word in sorted(said))
        own = sum(weight[word] for word in sorted(said))
        all_said = sum(weight[word] * shares[word] for word in sorted(shares))
        found.append((agreed / own if own else 0.0, agreed / all_said if all_said else 0.0))
    return found
