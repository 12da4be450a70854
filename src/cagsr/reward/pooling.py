"""From tokens to words, so that a word split into pieces counts once; what each word weighs; and the last token."""

from typing import Literal

import torch
from torch import Tensor


def pool_pieces(attention: Tensor, words: Tensor, num_words: int, how: Literal["sum", "max"] = "sum") -> Tensor:
    """Pool attention probabilities ``(batch, response, prompt)`` to the pieces of each salient word, ``(batch, response,
    words)`` float32.

    ``words`` ``(batch, prompt)`` int64 is the word of each prompt token, -1 (padding, template, sink, unimportant) is left
    out; a word without a piece gets 0. ``how``: the total over the pieces, or the largest. ValueError: the shapes do not
    belong together, or a word index is not below ``num_words``.
    """
    batch, response, prompt = attention.shape
    if words.shape != (batch, prompt):
        raise ValueError(f"words has shape {tuple(words.shape)}, attention asks for {(batch, prompt)}")
    if words.numel() and int(words.max()) >= num_words:
        raise ValueError(f"words holds index {int(words.max())}, but there are {num_words} words")
    if num_words == 0:
        return attention.new_zeros(batch, response, 0, dtype=torch.float32)
    salient = (words >= 0)[:, None, :]
    values = torch.where(salient, attention.float(), 0.0)
    index = words.clamp(min=0)[:, None, :].expand(batch, response, prompt)
    pooled = torch.zeros(batch, response, num_words, dtype=torch.float32, device=attention.device)
    # Unimportant tokens land on word 0 with the value 0, which changes neither a sum nor a maximum of values >= 0.
    reduction: Literal["sum", "amax"] = "sum" if how == "sum" else "amax"
    return pooled.scatter_reduce(2, index, values, reduce=reduction, include_self=True)


def normalized_salience(salience: Tensor) -> Tensor:
    """Divide ``(batch, words)`` weights >= 0 by their row sums; a row of zeros stays zero. Returns float32."""
    weights = salience.float()
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def add_at_last_token(tokens: Tensor, amount: Tensor, mask: Tensor) -> Tensor:
    """Add an amount per sequence, ``(batch,)``, to its last real token, never to padding; a new ``(batch, response)`` tensor.

    ``mask`` ``(batch, response)`` bool marks real tokens; sequences without one are unchanged.
    """
    if mask.shape[1] == 0:
        return tokens.clone()
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (position * mask).argmax(dim=1)
    paid = torch.where(mask.any(dim=1), amount, torch.zeros_like(amount))
    return tokens.scatter_add(1, last[:, None], paid.to(tokens.dtype)[:, None])
