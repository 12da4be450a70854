"""Work that is long without taking long."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from cagsr.support import progress
from cagsr.support.progress import Display


def every_pass_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the display's thread find in every forward pass of a Llama that a line is due."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 1e-9)
    monkeypatch.setattr(Display, "_watch", lambda self: None)
    forward = LlamaMLP.forward

    def slowly(self: LlamaMLP, x: Any) -> Any:
        display = progress._CURRENT.get()
        if display is not None:
            display.tick()
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", slowly)
