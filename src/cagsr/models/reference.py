"""The frozen starting model, which the KL leash is tied to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cagsr.models.load import LoadedModel


class Reference:
    """The policy as it was before training.

    Under LoRA it is the policy's own weights with the adapter switched off, so it costs no memory; otherwise a frozen
    copy in the compute precision.

    Args:
        loaded: the policy, before its first update.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._policy = loaded.model
        self._lora = loaded.lora
        self._copy: nn.Module | None = None
        if not loaded.lora:
            self._copy = copy.deepcopy(loaded.model).to(loaded.compute_dtype).eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The module whose forward runs inside ``model()``: what an attention reader must watch."""
        return self._policy if self._copy is None else self._copy

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Give the reference model for forward passes inside the ``with`` block."""
        if self._copy is not None:
            yield self._copy
        else:
            with self._policy.disable_adapter():
                yield self._policy
