"""A model's output layer, run on a few positions at a time: no logits of a whole batch ever exist, nor their gradients.

With 262,144 pieces in the vocabulary the logits of 8 answers of 128 tokens are a gigabyte, and a softmax of them and their
gradients as much again. What is wanted is a few numbers of each position (a log-probability, an entropy), so the layer is run on
a block of positions, they are worked out, and the block's logits are gone.

Each position's numbers depend on its own hidden state alone. So their gradients by it, a vector each, are worked out while the
logits are there; the backward pass multiplies them by what it is handed. Only where the layer itself is trained are the logits made
a second time. (``torch.nn.functional.linear_cross_entropy`` gives no entropy, soft-capping or adapters, and was ten times as slow
on a CPU; TRL's chunked log-probabilities make the logits twice in any case.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cagsr.models.logit_rule import LogitRule, added_bias

NUMBERS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}
"""Logits of one block (32 MiB, 512 MiB): enough positions that reading the layer's weights does not take the time."""

Statistics = Callable[..., Tensor]
"""``(logits, *own) -> (positions, numbers)`` float32 of logits ``(positions, vocabulary)`` and what each position has of its own
(its token, ...): row by row, no row looks at another. Differentiable where it is used in an update."""


@dataclass(frozen=True)
class OutputLayer:
    """How logits are made of last hidden states."""

    module: nn.Module
    rule: LogitRule
    bias: Tensor | float = 0.0
    """Added behind the module."""

    @classmethod
    def of(cls, model: nn.Module, rule: LogitRule) -> OutputLayer:
        """The layer of a model whose rule is known."""
        return cls(model.get_output_embeddings(), rule, added_bias(model))

    def logits(self, hidden: Tensor) -> Tensor:
        """``(positions, vocabulary)`` float32."""
        return self.rule(self.module(hidden) + self.bias)

    def statistics(self, hidden: Tensor, own: Sequence[Tensor], statistics: Statistics) -> Tensor:
        """``statistics`` of hidden states ``(positions, width)``, ``own`` ``(positions,)``: ``(positions, numbers)`` float32."""
        layer, autocast = self.module, torch.is_autocast_enabled(hidden.device.type)
        size = block_size(int(layer.weight.shape[0]), hidden.device)
        if type(layer) is not nn.Linear:  # more than a matrix and a bias (an adapter, a quantised layer): asked itself
            return by_blocks(lambda block, *rest: statistics(self.logits(block), *rest), hidden, own, size)
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype)
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        if torch.is_grad_enabled() and (hidden.requires_grad or trained):
            found: Tensor = _Blocks.apply(hidden, layer.weight, layer.bias, self._finished, own, statistics, size)
            return found
        weight, bias = _matrix(layer.weight, layer.bias, hidden.dtype)
        return by_blocks(
            lambda block, *rest: statistics(self._finished(functional.linear(block, weight, bias)), *rest),
            hidden,
            own,
            size,
        )

    def _finished(self, numbers: Tensor) -> Tensor:
        return self.rule(numbers + self.bias) if isinstance(self.bias, Tensor) else self.rule(numbers)


def block_size(vocabulary: int, device: torch.device) -> int:
    """Positions whose logits are made at a time."""
    return max(1, NUMBERS_AT_ONCE.get(device.type, NUMBERS_AT_ONCE["cpu"]) // vocabulary)


def by_blocks(function: Callable[..., Tensor], rows: Tensor, own: Sequence[Tensor], size: int) -> Tensor:
    """``function(rows, *own)``, ``size`` rows at a time; where gradients are wanted, worked out again in the backward pass."""
    blocks = zip(*(one.split(size) for one in (rows, *own)), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(function, *one, use_reentrant=False, preserve_rng_state=False) for one in blocks])
    return torch.cat([function(*one) for one in blocks])


class _Blocks(torch.autograd.Function):
    """Statistics of a linear layer's logits, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finish: Callable[[Tensor], Tensor],
        own: Sequence[Tensor],
        statistics: Statistics,
        size: int,
    ) -> Tensor:
        matrix = _matrix(weight, bias, hidden.dtype)
        values, slopes = [], []
        for block, *rest in zip(*(one.split(size) for one in (hidden, *own)), strict=True):
            numbers, found = _differentiable(block, matrix, finish, rest, statistics)
            values.append(found.detach())
            if ctx.needs_input_grad[0]:
                # Rows don't look at one another: the gradient of a column's sum is each row's own.
                units = torch.eye(found.shape[1], device=found.device)
                slopes.append(
                    torch.stack(
                        [
                            torch.autograd.grad(found, numbers, unit.expand_as(found), retain_graph=True)[0] @ matrix[0]
                            for unit in units
                        ],
                        dim=1,
                    )
                )
        kept = torch.cat(slopes) if slopes else None
        ctx.save_for_backward(hidden, weight, bias, kept, *own)
        ctx.rest = finish, statistics, size
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, slopes, *own = ctx.saved_tensors
        finish, statistics, size = ctx.rest
        of_hidden = of_weight = of_bias = None
        if slopes is not None:
            of_hidden = (grad[:, :, None].to(slopes.dtype) * slopes).sum(dim=1)
        if any(ctx.needs_input_grad[1:3]):
            matrix = _matrix(weight, bias, hidden.dtype)
            of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
            for block, one, *rest in zip(*(every.split(size) for every in (hidden, grad, *own)), strict=True):
                numbers, found = _differentiable(block, matrix, finish, rest, statistics)
                (moved,) = torch.autograd.grad(found, numbers, one)
                if of_weight is not None and of_weight.dtype == moved.dtype:
                    of_weight.addmm_(moved.t(), block)
                elif of_weight is not None:
                    of_weight.add_(moved.t() @ block)
                if of_bias is not None:
                    of_bias.add_(moved.sum(dim=0))
        return of_hidden, of_weight, of_bias, None, None, None, None


def _differentiable(
    block: Tensor,
    matrix: tuple[Tensor, Tensor | None],
    finish: Callable[[Tensor], Tensor],
    own: Sequence[Tensor],
    statistics: Statistics,
) -> tuple[Tensor, Tensor]:
    """The layer's numbers of a block and their statistics, differentiable by the numbers alone."""
    numbers = functional.linear(block, *matrix).requires_grad_()
    with torch.enable_grad():
        return numbers, statistics(finish(numbers), *own)


def _matrix(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the precision of a pass, cast once and not for each block."""
    return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
