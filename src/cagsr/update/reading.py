"""Which attention to read of a teacher-forced pass, whatever rows and forwards the pass is made of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cagsr.attention import AttentionRegion, PromptAttentionReader, Reading, ReadingsInTurn
from cagsr.models.forward import PassInputs, fed_rows, of_batch
from cagsr.models.generation import decoder_prefix


def regions(model: nn.Module, inputs: PassInputs, encoder_decoder: bool) -> list[AttentionRegion]:
    """A region for each forward of ``teacher_forced(model, inputs, ...)``, in their order.

    Args:
        model: what the pass runs through.
        inputs: the batch; two forwards where its prompts are read apart from their answers.
        encoder_decoder: which kind of model it is.
    """
    if encoder_decoder:
        return [AttentionRegion.encoder_decoder(inputs.prompt_mask, inputs.response_mask, len(decoder_prefix(model)))]
    fed, _ = fed_rows(model, inputs)
    prompt, response = fed.prompt_mask, fed.response_mask
    if fed.shared is None:
        return [AttentionRegion.left_padded(prompt, response)]
    prompts = prompt[fed.shared.first]
    found = [AttentionRegion.left_padded(prompts, torch.ones_like(prompts[:, :1]))]
    if response.shape[1] > 1:
        found.append(AttentionRegion.after_prefix(prompt, response[:, 1:]))
    return found


def batch_attention(model: nn.Module, inputs: PassInputs, encoder_decoder: bool, found: Sequence[Tensor]) -> Tensor:
    """Put together what was read in ``regions``: ``(batch, response, prompt)`` float32."""
    if encoder_decoder:
        return found[0]
    fed, held_by = fed_rows(model, inputs)
    if fed.shared is None:
        return of_batch(found[0], held_by)
    first, *rest = found
    return of_batch(torch.cat([first.index_select(0, fed.shared.of_row), *rest], dim=1), held_by)


def reading(
    reader: PromptAttentionReader | None, model: nn.Module, inputs: PassInputs, encoder_decoder: bool
) -> AbstractContextManager[Reading | ReadingsInTurn | None]:
    """What listens to the forwards of one teacher-forced pass; nothing without a reader."""
    if reader is None:
        return nullcontext()
    found = regions(model, inputs, encoder_decoder)
    return reader.read(found[0]) if len(found) == 1 else ReadingsInTurn(reader, found)


def attention_of(read: Reading | ReadingsInTurn, model: nn.Module, inputs: PassInputs, encoder_decoder: bool) -> Tensor:
    """The prompt attention that ``reading`` heard, ``(batch, response, prompt)`` float32, zero on padding."""
    found = [read.attention] if isinstance(read, Reading) else read.attention
    return batch_attention(model, inputs, encoder_decoder, found)
