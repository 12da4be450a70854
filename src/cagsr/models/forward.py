"""One teacher-forced pass over prompt + response, whatever kind of model it runs through."""

from __future__ import annotations

from torch import Tensor, nn

from cagsr.models.architecture import Architecture
from cagsr.models.decoder_only import of_batch
from cagsr.models.inputs import PassInputs


def teacher_forced(
    model: nn.Module,
    architecture: Architecture,
    inputs: PassInputs,
    pad_token_id: int,
    *,
    with_hidden: bool = False,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One pass over prompt and response, the sampled tokens as input.

    Args:
        model: a transformers (or peft) language model.
        architecture: which kind it is.
        inputs: ids and masks; where prompts are shared, each is read once.
        pad_token_id: put where the masks are False.
        with_hidden: also return the input of the output embedding (the last hidden state).
        with_logits: False: only the hidden states are wanted, and no time and memory goes into logits.

    Returns:
        Logits ``(batch, response, vocabulary)`` at the positions that predict each response token (of no position, if they
        are not wanted) and, if asked for, hidden states ``(batch, response, width)``.
    """
    seen: list[Tensor] = []
    handle = None
    if with_hidden:

        def before_output_embedding(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            # Its own input: the last hidden state after the final norm (and T5's scaling), without
            # output_hidden_states, which would keep every layer's.
            seen.append(args[0])
            return None if with_logits else (args[0][:, :0],)

        handle = model.get_output_embeddings().register_forward_pre_hook(before_output_embedding)
    fed, held_by = architecture.rows_fed(model, inputs)
    try:
        logits = architecture.logits(model, fed, pad_token_id)
    finally:
        if handle is not None:
            handle.remove()
    length = inputs.response_ids.shape[1]
    logits = of_batch(logits[:, -length:], held_by)
    return logits, of_batch(architecture.hidden(seen, fed)[:, -length:], held_by) if seen else None
