"""The log-sum-exp of the scores, which a fused attention kernel has computed already: kept, not computed again.

With it, ``exp(q·k scaling + mask - logsumexp)`` is the attention probability of one key by itself, so that only the
prompt columns have to be looked at. ``scaled_dot_product_attention`` throws it away; a dispatch mode around the model's
own call sees the kernel underneath return it. The call stays the model's: its output is the same bit for bit, and
autograd, which works above the dispatch mode, has its gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cagsr.errors import AttentionError

_ATEN = torch.ops.aten
_ON_CPU = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_FLASH = _ATEN._scaled_dot_product_flash_attention.default
_EFFICIENT = _ATEN._scaled_dot_product_efficient_attention.default
_EFFICIENT_WANTS = 4
"""Which argument tells the memory-efficient kernel to return the log-sum-exp; without gradients it would not."""


class LogSumExpRecorder(TorchDispatchMode):
    """While active, keeps the log-sum-exp of the one attention kernel that runs."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _EFFICIENT:
            args = (*args[:_EFFICIENT_WANTS], True, *args[_EFFICIENT_WANTS + 1 :])
        output = func(*args, **(kwargs or {}))
        if func in (_ON_CPU, _FLASH, _EFFICIENT):
            self._found.append((args[0], output[1]))
        return output

    def found(self, query: Tensor) -> Tensor | None:
        """Give the log-sum-exp of the scores of ``query``, natural logarithm, ``(batch, heads, queries)`` float32.

        ``query`` is ``(batch, heads, queries, width)``, as the model handed it to its attention function. None where no kernel ran
        that computes it, more than one ran, or the one that ran saw another query (autocast had made it less precise) or was not
        precise itself.
        """
        if len(self._found) != 1:
            return None
        seen, logsumexp = self._found[0]
        # On a CPU, kernels below float32 approximate the exponential: up to 6e-5 off.
        precise = seen.device.type != "cpu" or seen.dtype == torch.float32
        if seen.dtype != query.dtype or seen.shape != query.shape or not precise:
            return None
        queries = query.shape[2]
        if logsumexp.dim() != 3 or logsumexp.shape[:2] != query.shape[:2] or logsumexp.shape[2] < queries:
            raise AttentionError(
                f"An attention kernel returned a log-sum-exp of shape {tuple(logsumexp.shape)} for queries of shape "
                f"{tuple(query.shape)}: this version of torch is not known; load the model with "
                f"attn_implementation='eager'."
            )
        # The memory-efficient kernel pads the queries to a multiple of its block.
        return logsumexp[..., :queries].float()
