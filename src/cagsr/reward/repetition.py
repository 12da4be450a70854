"""Repetition: the share of an answer's n-grams that it has said before."""

from __future__ import annotations

import torch
from torch import Tensor


def without_stop_token(mask: Tensor, ended: Tensor) -> Tensor:
    """Unmask the last real token of every answer that ended by itself: its stop token.

    A stop token occurs once, so n-grams with it never repeat and would dilute the share for answers that ended but not
    for answers that were cut. (An answer ended by a stop string loses its last token of the string instead.)

    Args:
        mask: ``(batch, response)`` bool.
        ended: ``(batch,)`` bool.

    Returns:
        ``(batch, response)`` bool.
    """
    remaining = mask.flip(1).cumsum(dim=1).flip(1)  # 1 at the last real token
    return mask & ~((remaining == 1) & ended[:, None])


def repeated_ngrams(ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Price each token: a repeated n-gram costs ``1 / (number of n-grams)`` at its last token.

    An n-gram is repeated where the same n tokens occur earlier in the same answer; the prices of an answer sum to
    ``P = 1 - distinct n-grams / n-grams``.

    Args:
        ids: ``(batch, response)`` int64.
        mask: ``(batch, response)`` bool, the tokens that count.
        n: length of the n-grams, >= 1.

    Returns:
        ``(batch, response)`` float32 >= 0, on the device of ``ids``; zeros for answers shorter than n tokens.
    """
    prices = torch.zeros(ids.shape, dtype=torch.float32)
    if ids.shape[1] < n:
        return prices.to(ids.device)
    grams = ids.cpu().unfold(1, n, 1)  # (batch, windows, n)
    valid = mask.cpu().unfold(1, n, 1).all(dim=2)
    row, start = valid.nonzero(as_tuple=True)
    if row.numel() == 0:
        return prices.to(ids.device)
    # The same n-gram in two answers is no repetition: the row is part of the key. Unique over all rows at once keeps
    # this O(tokens log tokens) in time and O(tokens) in memory.
    keys = torch.cat([row[:, None], grams[row, start]], dim=1)
    distinct, which = torch.unique(keys, dim=0, return_inverse=True)
    order = torch.arange(len(keys))
    first = torch.full((len(distinct),), len(keys)).scatter_reduce(0, which, order, reduce="amin")
    repeated = order != first[which]
    count = valid.sum(dim=1).float()
    prices[row, start + n - 1] = repeated.float() / count[row]
    return prices.to(ids.device)


def repetition(ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Repetition ``P = 1 - distinct n-grams / n-grams``, ``(batch,)`` float32 in [0, 1).

    Arguments as in :func:`repeated_ngrams`; answers shorter than n tokens give 0.
    """
    return repeated_ngrams(ids, mask, n).sum(dim=1)
