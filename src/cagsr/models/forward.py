"""One teacher-forced pass over prompt + response; a prompt with several answers is read once.

The answers to a prompt share its prefix, so its keys and values are computed once for all of them, in the update's pass
too: gradients flow through them. Encoder-decoder models run their encoder once a prompt.

Each token is scored as it is sampled: by what the model gives for the tokens before it. Where keys change with the length
of a row (``models/lengths.py``), a row that crosses a border is fed once for each side of it.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cagsr.errors import ModelError
from cagsr.flow import Rollout
from cagsr.models.cache import rows_can_be_picked
from cagsr.models.checkpointing import is_checkpointed
from cagsr.models.generation import decoder_prefix
from cagsr.models.lengths import length_borders, read_as_long_as
from cagsr.models.load import LoadedModel

WORTH = 1.5
"""Answers to a prompt, on average, from which on its prefix is read apart: two forwards cost more than one."""


@dataclass(frozen=True)
class SharedPrompts:
    """Which rows of a batch answer the same prompt."""

    first: Tensor  # (prompts,) int64: a row with each prompt
    of_row: Tensor  # (batch,) int64: each row's prompt


@dataclass(frozen=True)
class PassInputs:
    """A batch of prompts and answers, as the model's forward takes them."""

    prompt_ids: Tensor  # (batch, prompt)
    prompt_mask: Tensor  # (batch, prompt)
    response_ids: Tensor  # (batch, response)
    response_mask: Tensor  # (batch, response)
    shared: SharedPrompts | None = None  # where each prompt is read once for its answers
    lengths: Tensor | None = None  # (batch,) tokens by which a row's rotary frequencies go; None: they do not change

    @classmethod
    def of(cls, rollout: Rollout, *, share: bool = False) -> PassInputs:
        """Take the tensors of a rollout.

        Args:
            rollout: prompts and answers.
            share: read a prompt once for all of its answers, where that pays; only for models that ``shares_prompts``
                says yes of.
        """
        prompts = rollout.prompts
        shared = _shared(prompts.group) if share else None
        return cls(prompts.ids, prompts.mask, rollout.response_ids, rollout.response_mask, shared)

    @classmethod
    def tiny(cls, device: torch.device) -> PassInputs:
        """Make the smallest batch any model takes."""
        ids = torch.ones(1, 2, dtype=torch.long, device=device)
        return cls(ids, ids.bool(), ids, ids.bool())


def shares_prompts(loaded: LoadedModel, rollout: Rollout) -> bool:
    """Whether this model can read a prompt once for all its answers: its log-probabilities are then the same.

    Asked of the model itself: by one tiny batch, once, and by the longest row of each rollout that is longer than all
    before it, for what a cache forgets (a window, a border of its own) shows at some length only. False for caches whose
    rows can't be picked (state-space layers), under gradient checkpointing, which keeps no keys and values, and wherever
    the log-probabilities come out different.

    Args:
        loaded: the model; where its weights are divided among processes they must be whole here.
        rollout: what is to be read.
    """
    model = loaded.model
    if is_checkpointed(model):
        return False
    if model not in _KNOWN:
        _KNOWN[model] = (_agrees_on_tiny_batch(loaded), 0)
    agrees, asked = _KNOWN[model]
    lengths = rollout.prompts.mask.sum(dim=1) + rollout.response_mask.sum(dim=1)
    longest = int(lengths.max())
    if agrees and longest > asked:
        row = lengths.argmax().repeat(2)
        inputs = PassInputs(
            rollout.prompts.ids[row], rollout.prompts.mask[row], rollout.response_ids[row], rollout.response_mask[row]
        )
        _KNOWN[model] = (_agrees(loaded, inputs, torch.zeros_like(row)), longest)
    return _KNOWN[model][0]


def stop_sharing(model: nn.Module) -> None:
    """Read each prompt with each answer from now on: ``shares_prompts`` says no of this model."""
    _KNOWN[model] = (False, 0)


def sharing_stopped(model: nn.Module) -> bool:
    """Whether ``shares_prompts`` has said no of this model; False where it was not asked yet."""
    return not _KNOWN.get(model, (True, 0))[0]


def fed_rows(model: nn.Module, inputs: PassInputs) -> tuple[PassInputs, Tensor | None]:
    """The rows that a decoder-only model is fed: those of the batch, but once for each side of a border they cross.

    A token is predicted by the tokens before it, and where their number passes one of the model's ``length_borders``,
    all their keys change. A row that crosses is fed up to the border, as a short one, and whole, as a long one.

    Args:
        model: a transformers or peft model.
        inputs: the batch.

    Returns:
        What to feed, and ``(batch, response)`` int64, which of the rows fed holds each token: see ``of_batch``. None: the
        rows fed are those of the batch.
    """
    borders = length_borders(model)
    if not borders:
        return inputs, None
    edges = torch.tensor(borders, device=inputs.prompt_ids.device)
    prompt = inputs.prompt_mask.sum(dim=1)
    before_last = prompt + inputs.response_mask.sum(dim=1).clamp(min=1) - 1
    first, last = torch.searchsorted(edges, prompt), torch.searchsorted(edges, before_last)  # borders below
    if bool((first == last).all()):
        return replace(inputs, lengths=before_last), None
    sides = torch.arange(len(borders) + 1, device=edges.device)
    there = (first[:, None] <= sides) & (sides <= last[:, None])
    row, side = there.nonzero(as_tuple=True)
    # The last token of a side has as many tokens before it as the border says.
    lengths = torch.where(side < last[row], edges[side.clamp(max=len(borders) - 1)], before_last[row])
    tokens = torch.arange(inputs.response_ids.shape[1], device=edges.device)
    fed = PassInputs(
        inputs.prompt_ids[row],
        inputs.prompt_mask[row],
        inputs.response_ids[row],
        inputs.response_mask[row] & (prompt[row, None] + tokens <= lengths[:, None]),
        None if inputs.shared is None else _shared(inputs.shared.of_row[row] * len(sides) + side),
        lengths,
    )
    place = (there.flatten().cumsum(dim=0) - 1).view_as(there)
    side_of_token = torch.minimum(torch.searchsorted(edges, prompt[:, None] + tokens), last[:, None])
    return fed, place.gather(1, side_of_token)


def of_batch(found: Tensor, held_by: Tensor | None) -> Tensor:
    """Put together what was found for the rows fed, ``(fed, response, ...)``, as ``(batch, response, ...)``.

    Args:
        found: a value for each token of the rows fed.
        held_by: what ``fed_rows`` gave beside them.
    """
    if held_by is None:
        return found
    width = found.shape[1]
    return found[held_by[:, :width], torch.arange(width, device=found.device)]


def teacher_forced(
    model: nn.Module,
    inputs: PassInputs,
    encoder_decoder: bool,
    pad_token_id: int,
    *,
    with_hidden: bool = False,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One forward pass over prompt and response.

    Decoder-only: the last response token is not fed (nothing follows it), positions count real tokens only, and only
    the logits that predict response tokens are computed where the model allows it. Encoder-decoder: the prompt is the
    encoder's input and the response, shifted right behind ``decoder_prefix``, the decoder's.

    Args:
        model: a transformers (or peft) language model.
        inputs: ids and masks; where prompts are shared, a decoder-only model runs twice: over the prompts, then over the
            responses.
        encoder_decoder: which of the two it is.
        pad_token_id: put where the masks are False.
        with_hidden: also return the input of the output embedding (the last hidden state).
        with_logits: False: only the hidden states are wanted, and no time and memory goes into logits.

    Returns:
        Logits ``(batch, response, vocabulary)`` (of no position, if they are not wanted) and, if asked for, hidden states
        ``(batch, response, width)``.
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
    fed, held_by = (inputs, None) if encoder_decoder else fed_rows(model, inputs)
    try:
        if encoder_decoder:
            logits = _encoder_decoder_pass(model, fed, pad_token_id)
        elif fed.shared is not None:
            logits = _prefix_pass(model, fed, fed.shared, pad_token_id)
        else:
            logits = _decoder_only_pass(model, fed, pad_token_id)
    finally:
        if handle is not None:
            handle.remove()
    length = inputs.response_ids.shape[1]
    logits = of_batch(logits[:, -length:], held_by)
    if not seen:
        return logits, None
    hidden = seen[0]
    if fed.shared is not None and not encoder_decoder:
        hidden = torch.cat([hidden[:, -1:].index_select(0, fed.shared.of_row), *seen[1:]], dim=1)
    return logits, of_batch(hidden[:, -length:], held_by)


def _decoder_only_pass(model: nn.Module, inputs: PassInputs, pad_token_id: int) -> Tensor:
    response = inputs.response_ids.masked_fill(~inputs.response_mask, pad_token_id)
    ids = torch.cat([inputs.prompt_ids, response[:, :-1]], dim=1)
    mask = torch.cat([inputs.prompt_mask, inputs.response_mask[:, :-1]], dim=1)
    return _forward(model, ids, mask, inputs.response_ids.shape[1], inputs.lengths).logits


def _prefix_pass(model: nn.Module, inputs: PassInputs, shared: SharedPrompts, pad_token_id: int) -> Tensor:
    """The same logits: a prompt's last position predicts every answer's first token, its cache serves the others."""
    first = shared.first
    lengths = None if inputs.lengths is None else inputs.lengths[first]
    output = _forward(model, inputs.prompt_ids[first], inputs.prompt_mask[first], 1, lengths, use_cache=True)
    logits = output.logits[:, -1:].index_select(0, shared.of_row)
    length = inputs.response_ids.shape[1]
    if length == 1:
        return logits
    cache = output.past_key_values
    cache.reorder_cache(shared.of_row)
    response = inputs.response_ids.masked_fill(~inputs.response_mask, pad_token_id)[:, :-1]
    mask = torch.cat([inputs.prompt_mask, inputs.response_mask[:, :-1]], dim=1)
    rest = _forward(model, response, mask, length - 1, inputs.lengths, past_key_values=cache, use_cache=True)
    return torch.cat([logits, rest.logits], dim=1)


def _forward(
    model: nn.Module, ids: Tensor, mask: Tensor, keep: int, lengths: Tensor | None = None, **cache: Any
) -> Any:
    """A decoder-only forward over the last ``ids.shape[1]`` of the positions of ``mask``."""
    mask = mask.long()
    accepted = _forward_parameters(model)
    arguments: dict[str, Any] = cache or {"use_cache": False}
    if "position_ids" in accepted:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    with nullcontext() if lengths is None else read_as_long_as(lengths):
        return model(input_ids=ids, attention_mask=mask, **arguments)


def _encoder_decoder_pass(model: nn.Module, inputs: PassInputs, pad_token_id: int) -> Tensor:
    if (borders := length_borders(model)) and inputs.response_ids.shape[1] > borders[0]:
        raise ModelError(
            f"Answers of {inputs.response_ids.shape[1]} tokens: the decoder of this {model.config.model_type} model changes "
            f"its rotary frequencies beyond {borders[0]} tokens, which is read of decoder-only models alone; ask for shorter ones."
        )
    response = inputs.response_ids.masked_fill(~inputs.response_mask, pad_token_id)
    before = response.new_tensor(decoder_prefix(model)).expand(len(response), -1)
    decoder_ids = torch.cat([before, response[:, :-1]], dim=1)
    decoder_mask = torch.cat([torch.ones_like(before, dtype=torch.bool), inputs.response_mask[:, :-1]], dim=1)
    encoder: dict[str, Any] = {"input_ids": inputs.prompt_ids}
    if inputs.shared is not None:
        first = inputs.shared.first
        output = model.get_encoder()(
            input_ids=inputs.prompt_ids[first], attention_mask=inputs.prompt_mask[first].long()
        )
        output.last_hidden_state = output.last_hidden_state.index_select(0, inputs.shared.of_row)
        encoder = {"encoder_outputs": output}
    return model(
        **encoder,
        attention_mask=inputs.prompt_mask.long(),
        decoder_input_ids=decoder_ids,
        decoder_attention_mask=decoder_mask.long(),
        use_cache=False,
    ).logits


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    """Argument names of the underlying model's forward (peft's own takes anything)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)


def _shared(group: Tensor) -> SharedPrompts | None:
    prompts, of_row = torch.unique(group, return_inverse=True)
    if len(group) < WORTH * len(prompts):
        return None
    rows = torch.arange(len(group), device=group.device)
    first = torch.full_like(prompts, len(group)).scatter_reduce(0, of_row, rows, "amin")
    return SharedPrompts(first, of_row)


_KNOWN: WeakKeyDictionary[nn.Module, tuple[bool, int]] = WeakKeyDictionary()
"""Whether a model's prompts can be shared, and the longest row by which that was asked."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@torch.no_grad()
def _agrees_on_tiny_batch(loaded: LoadedModel) -> bool:
    """Two prompts of different lengths, two answers each."""
    model, device = loaded.model, loaded.device
    ids = torch.arange(20, device=device).remainder(model.get_input_embeddings().weight.shape[0]).view(4, 5)
    prompt_ids = ids[[0, 0, 1, 1], :3]
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    prompt_mask[:2, -1 if loaded.encoder_decoder else 0] = False
    response_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], device=device).bool()
    if not loaded.encoder_decoder:
        with loaded.autocast():
            cache = _forward(model, prompt_ids[:1], torch.ones_like(prompt_mask[:1]), 1, use_cache=True)
        if not rows_can_be_picked(getattr(cache, "past_key_values", None)):
            return False
    inputs = PassInputs(prompt_ids, prompt_mask, ids[:, 2:], response_mask)
    return _agrees(loaded, inputs, torch.tensor([0, 0, 1, 1], device=device))


@torch.no_grad()
def _agrees(loaded: LoadedModel, plain: PassInputs, group: Tensor) -> bool:
    """The logits of both passes, side by side; ``group`` says which rows have the same prompt."""
    shared = replace(plain, shared=_shared(group))
    with loaded.autocast():
        found = [
            teacher_forced(loaded.model, inputs, loaded.encoder_decoder, loaded.pad_token_id)[0].float()[
                plain.response_mask
            ]
            for inputs in (plain, shared)
        ]
    largest = float(found[0].abs().max())
    return float((found[0] - found[1]).abs().max()) <= _TOLERANCE[loaded.compute_dtype] * max(1.0, largest)
