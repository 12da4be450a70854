"""One pass that gives a few numbers of each position that predicts a token, and never the logits of all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cagsr.models.architecture import Architecture, teacher_forced
from cagsr.models.inputs import PassInputs
from cagsr.models.logit_rule import LogitRule
from cagsr.models.output_layer import OutputLayer, Statistics, block_size, by_blocks


def token_statistics(
    model: nn.Module,
    architecture: Architecture,
    inputs: PassInputs,
    pad_token_id: int,
    rule: LogitRule | None,
    statistics: Statistics,
    at: Tensor,
    *,
    with_hidden: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run prompt + response through the model, the sampled tokens as input, and its output layer at the tokens ``at``.

    ``statistics`` is handed logits ``(tokens, vocabulary)`` float32 of a block of them, their ids and their places in the
    response, ``(tokens,)`` int64. Gives what it made of them, ``(batch, response, numbers)`` float32, differentiable and zero
    elsewhere, and, ``with_hidden``, the last hidden states ``(batch, response, width)``. Where the model's ``rule`` is not known
    its own logits are made, all at once.
    """
    logits, hidden = teacher_forced(
        model, architecture, inputs, pad_token_id, with_hidden=with_hidden or rule is not None, with_logits=rule is None
    )
    ids = inputs.response_ids
    own = [ids[at], torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[at]]
    if rule is None:
        found = by_blocks(
            lambda block, *rest: statistics(block.float(), *rest),
            logits[at],
            own,
            block_size(logits.shape[-1], logits.device),
        )
    else:
        assert hidden is not None
        found = OutputLayer.of(model, rule).statistics(hidden[at], own, statistics)
    spread = found.new_zeros(*at.shape, found.shape[1]).index_put((at,), found)
    return spread, hidden if with_hidden else None
