"""From scores to the probabilities of chosen columns, summed over heads: the mathematics of one block.

Two ways to the same numbers. ``softmax_columns`` weighs all keys that a row sees and keeps the chosen columns.
``exponential_columns`` computes the chosen columns alone, given the log-sum-exp of each row's scores.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """How one layer turns scores into probabilities."""

    scaling: float
    softcap: float | None = None
    """Scores are bent to ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118, section 2)."""
    position_bias: Tensor | None = None
    """``(batch | 1, heads, queries, keys)``, added to the scores (T5)."""
    sinks: Tensor | None = None
    """``(heads,)``: the logit of a key that does not exist but takes its share (gpt-oss)."""


@dataclass
class Scratch:
    """Memory that every block of a layer uses again: no allocation, no page faults after the first block."""

    held: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Give an uninitialised float32 tensor of this shape, valid until the name is taken again."""
        count = math.prod(shape)
        memory = self.held.get((name, device))
        if memory is None or memory.numel() < count:
            memory = self.held[name, device] = torch.empty(count, dtype=torch.float32, device=device)
        return memory[:count].view(shape)


def softmax_columns(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    columns: slice | Tensor,
    softcap: float | None,
    scratch: Scratch | None,
) -> Tensor:
    """Take the softmax over all keys, then the chosen columns, summed over heads: ``(sequences, rows, columns)`` float32.

    ``query`` is ``(sequences, heads, rows, width)`` float32, scaled; ``key`` ``(sequences, key-value heads, keys, width)``,
    any float dtype. ``mask`` ``(sequences | 1, heads | 1, rows, keys)`` float32 and ``position_bias``, of one row or all,
    are added to the scores. ``sinks`` ``(heads,)`` and ``softcap`` as in ``Softmax``. ``columns`` lie within the keys; a
    tensor is ``(sequences, columns)`` int64, -1 for none. Without ``scratch`` all memory is new, as gradients need it.
    """
    n, heads, rows, _ = query.shape
    keys = key.shape[2]
    flat_query, flat_key = _by_key_head(query, key)
    shape = (flat_query.shape[0], flat_query.shape[1], keys)
    scores = torch.bmm(flat_query, flat_key, out=scratch and scratch.take("scores", shape, query.device))
    scores = scores.view(n, heads, rows, keys)
    if softcap is not None:
        scores = torch.tanh(scores.div_(softcap)) * softcap
    if position_bias is not None:
        scores = scores.add_(position_bias)
    if mask is not None:
        scores = scores.add_(mask)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(n, -1, rows, 1)
        probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        memory = scratch and scratch.take("probabilities", (n, heads, rows, keys), query.device)
        probabilities = torch.softmax(scores, dim=-1, out=memory)
    if isinstance(columns, slice):
        chosen = probabilities[..., columns]
        return chosen[:, 0] if heads == 1 else chosen.sum(1)
    index = columns[:, None, :]
    summed = probabilities.sum(1).gather(2, index.clamp(min=0).expand(-1, rows, -1))
    return summed.masked_fill(index < 0, 0.0)


def exponential_columns(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    logsumexp: Tensor,
    scratch: Scratch,
) -> Tensor:
    """Take ``exp(score - logsumexp)`` of the given keys, summed over heads; no gradients. As :func:`softmax_columns`, but that

    ``key`` holds the chosen columns alone, so do the mask (None: all are seen) and the bias; ``logsumexp`` is ``(sequences,
    heads, rows)`` of the scores over all keys that each row sees.
    """
    n, heads, rows, _ = query.shape
    columns = key.shape[2]
    flat_query, flat_key = _by_key_head(query, key)
    shape = (flat_query.shape[0], flat_query.shape[1], columns)
    minus = logsumexp.neg().reshape(*shape[:2], 1).expand(shape)
    memory = scratch.take("scores", shape, query.device)
    scores = torch.baddbmm(minus, flat_query, flat_key, out=memory).view(n, heads, rows, columns)
    if position_bias is not None:
        scores.add_(position_bias)
    if mask is not None:
        scores.add_(mask)
    probabilities = scores.exp_()
    return probabilities[:, 0] if heads == 1 else probabilities.sum(1)


def _by_key_head(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of the heads that share a key head one below the other; keys transposed, float32."""
    n, heads, rows, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    flat_query = query.reshape(n * kv_heads, heads // kv_heads * rows, width)
    flat_key = (key[:, 0] if kv_heads == 1 else key.reshape(n * kv_heads, keys, width)).float().transpose(1, 2)
    return flat_query, flat_key
