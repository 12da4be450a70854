"""The frozen starting model, which the KL leash is tied to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn

from cagsr.models.forward import PassInputs, teacher_forced
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import first_pass, shard_frozen, whole


class Reference:
    """The policy as it was before training.

    Under LoRA it is the policy's own weights with the adapter switched off, so it costs no memory; otherwise a frozen
    copy in the compute precision.

    Args:
        loaded: the policy, before its first update.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._policy = loaded.model
        self._copy: nn.Module | None = None
        if not loaded.lora:
            self._copy = copy.deepcopy(loaded.model).to(loaded.compute_dtype).eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The module whose forward runs inside ``model()``: what an attention reader must watch."""
        return self._policy if self._copy is None else self._copy

    def shard(self, accelerator: Accelerator) -> None:
        """Divide the frozen copy among the processes (FSDP2); under LoRA there is none."""
        if self._copy is None:
            return
        shard_frozen(accelerator, self._copy)
        loaded = self._loaded
        with first_pass(self._copy), loaded.autocast():
            teacher_forced(self._copy, PassInputs.tiny(loaded.device), loaded.encoder_decoder, loaded.pad_token_id)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Give the reference model for forward passes inside the ``with`` block."""
        if self._copy is not None:
            with whole(self._copy):
                yield self._copy
        else:
            with whole(self._policy), self._policy.disable_adapter():
                yield self._policy
