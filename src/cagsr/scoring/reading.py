"""The attention of a teacher-forced pass, whatever forwards the pass is made of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from cagsr.attention import PromptAttentionReader, Reading, ReadingsInTurn
from cagsr.models.architecture import Architecture
from cagsr.models.inputs import PassInputs


def reading(
    reader: PromptAttentionReader | None, architecture: Architecture, model: nn.Module, inputs: PassInputs
) -> AbstractContextManager[Reading | ReadingsInTurn | None]:
    """What listens to the forwards of one teacher-forced pass; nothing without a reader."""
    if reader is None:
        return nullcontext()
    found = architecture.regions(model, inputs)
    return reader.read(found[0]) if len(found) == 1 else ReadingsInTurn(reader, found)


def attention_of(
    read: Reading | ReadingsInTurn, architecture: Architecture, model: nn.Module, inputs: PassInputs
) -> Tensor:
    """The prompt attention that was read, ``(batch, response, prompt)`` float32, zero on padding."""
    found = [read.attention] if isinstance(read, Reading) else read.attention
    return architecture.attention(model, inputs, found)
