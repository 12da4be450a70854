"""The frozen starting model, which the KL leash is tied to."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from transformers.pytorch_utils import Conv1D

from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import first_pass, gathered, shard_frozen


class Reference:
    """The policy as it was before training; made before its first update.

    Under LoRA it is the policy's own weights with the adapter switched off, so it costs no memory; otherwise a frozen
    copy, whose matrices are in the compute precision.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._policy = loaded.model
        self._copy: nn.Module | None = None
        if not loaded.lora:
            self._copy = copy.deepcopy(loaded.model).eval().requires_grad_(False)
            _cast_matrices(self._copy, loaded.compute_dtype)

    @property
    def module(self) -> nn.Module:
        """The module whose forward runs inside ``model()``: what an attention reader must watch."""
        return self._policy if self._copy is None else self._copy

    def shard(self, accelerator: Accelerator) -> None:
        """Divide the frozen copy among the processes (FSDP2); under LoRA there is none."""
        if self._copy is None:
            return
        loaded = self._loaded
        self._copy.to(loaded.compute_dtype)  # weights that are divided together must be of one kind
        shard_frozen(accelerator, self._copy)
        with first_pass(self._copy), loaded.autocast():
            loaded.hidden_states(PassInputs.tiny(loaded.device), self._copy)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Give the reference model for forward passes inside the ``with`` block."""
        if self._copy is not None:
            with gathered(self._copy):
                yield self._copy
        else:
            with gathered(self._policy), self._policy.disable_adapter():
                yield self._policy


def _cast_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast once what autocast casts at every use: the same numbers as the policy's, for half the memory.

    Embeddings and norms stay float32. In bfloat16 they would make the residual stream bfloat16, where the policy's is
    float32, and the divergence from the reference would not be 0 before the first update.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight not in embeddings:
            module.to(dtype)
