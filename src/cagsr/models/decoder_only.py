"""Decoder-only models: prompt and answer are one sequence, prompts padded on the left; a shared prompt is read once.

The answers to a prompt share its prefix, so its keys and values are computed once for all of them, in the update's pass
too: gradients flow through them.

Each token is scored as it is sampled: by what the model gives for the tokens before it. Where keys change with the length
of a row (``models/lengths.py``), a row that crosses a border is fed once for each side of it.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerBase

from cagsr.attention.region import AttentionRegion
from cagsr.errors import ModelError
from cagsr.flow import ImageInputs
from cagsr.models.continuation import continuation_text
from cagsr.models.image_arguments import ImageArguments, padded_places
from cagsr.models.inputs import PassInputs, SharedPrompts
from cagsr.models.lengths import length_borders, read_as_long_as


class DecoderOnly:
    """See :class:`~cagsr.models.architecture.Architecture`."""

    padding_side: ClassVar[Literal["left", "right"]] = "left"
    one_sequence: ClassVar[bool] = True
    shares_context: ClassVar[bool] = True
    peft_task: ClassVar[str | None] = "CAUSAL_LM"

    def __init__(self, *, sees: bool = False) -> None:
        """``sees``: the model reads images too."""
        self.auto_class: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.pipeline_tag = "image-text-to-text" if sees else "text-generation"

    def rows_fed(self, model: nn.Module, inputs: PassInputs) -> tuple[PassInputs, Tensor | None]:
        """The rows of the batch, but once for each side of a border they cross.

        A token is predicted by the tokens before it, and where their number passes one of the model's ``length_borders``,
        all their keys change. A row that crosses is fed up to the border, as a short one, and whole, as a long one.
        """
        borders = length_borders(model)
        if not borders:
            return inputs, None
        if inputs.images is not None:
            raise ModelError(
                f"A prompt with images: the keys of this {model.config.model_type} model change with its length, which is read of "
                "texts alone."
            )
        edges = torch.tensor(borders, device=inputs.prompt_ids.device)
        prompt = inputs.prompt_real.sum(dim=1)
        before_last = prompt + inputs.response_real.sum(dim=1).clamp(min=1) - 1
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
            inputs.prompt_real[row],
            inputs.response_ids[row],
            inputs.response_real[row] & (prompt[row, None] + tokens <= lengths[:, None]),
            None if inputs.shared is None else SharedPrompts.of(inputs.shared.of_row[row] * len(sides) + side),
            lengths,
            None if inputs.sampled is None else inputs.sampled[row],
            None if inputs.looked_at is None else inputs.looked_at[row],
        )
        place = (there.flatten().cumsum(dim=0) - 1).view_as(there)
        side_of_token = torch.minimum(torch.searchsorted(edges, prompt[:, None] + tokens), last[:, None])
        return fed, place.gather(1, side_of_token)

    def logits(self, model: nn.Module, fed: PassInputs, pad_token_id: int) -> Tensor:
        """One forward over prompt and answer, or one over the prompts and one over the answers behind their cache.

        The last response token is not fed (nothing follows it), positions count real tokens only, and only the logits that
        predict response tokens are computed where the model allows it.
        """
        length = fed.response_ids.shape[1]
        response = fed.response_ids.masked_fill(~fed.response_real, pad_token_id)[:, :-1]
        mask = torch.cat([fed.prompt_real, fed.response_real[:, :-1]], dim=1)
        ids = torch.cat([fed.prompt_ids, response], dim=1)
        first = None if fed.shared is None else fed.shared.first
        images = None
        if fed.images is not None:
            answers = (torch.arange(ids.shape[1], device=ids.device) >= fed.prompt_ids.shape[1]).expand_as(ids)
            images = ImageArguments.of(model, fed.images, ids, mask, answers, first)
        if fed.shared is not None:
            return _prefix_pass(model, fed, fed.shared, response, mask, images)
        seen = {} if images is None else images.of_forward(with_images=True)
        return forward(model, ids, mask, length, fed.lengths, **seen).logits

    def hidden(self, seen: Sequence[Tensor], fed: PassInputs) -> Tensor:
        """Of one forward, or of two: the prompts' last position stands before their answers'."""
        if fed.shared is None:
            return seen[0]
        return torch.cat([seen[0][:, -1:].index_select(0, fed.shared.of_row), *seen[1:]], dim=1)

    def regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """A region, or two where prompts are read apart from their answers."""
        fed, _ = self.rows_fed(model, inputs)
        prompt, response, later = fed.prompt_real, fed.rows_read, fed.looked_at
        if fed.shared is None:
            return [AttentionRegion.left_padded(prompt, response, later)]
        prompts = prompt[fed.shared.first]
        found = [AttentionRegion.left_padded(prompts, torch.ones_like(prompts[:, :1]))]
        if response.shape[1] > 1:
            found.append(AttentionRegion.after_prefix(prompt, response[:, 1:], later))
        return found

    def attention(self, model: nn.Module, inputs: PassInputs, read: Sequence[Tensor]) -> Tensor:
        """The prompt's row for every answer's first token, the answers' rows for the others."""
        fed, held_by = self.rows_fed(model, inputs)
        if fed.shared is not None:
            first, *rest = read
            first = first.index_select(0, fed.shared.of_row)
            if rest:
                first = functional.pad(first, (0, rest[0].shape[2] - first.shape[2]))
            read = [torch.cat([first, *rest], dim=1)]
        found = of_batch(read[0], held_by)
        # The last response position is fed to nothing, so nothing looks at it.
        return (
            found
            if inputs.looked_at is None
            else functional.pad(found, (0, inputs.prompt_ids.shape[1] + inputs.response_ids.shape[1] - found.shape[2]))
        )

    def image_regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """The rows of :meth:`regions`, which look at the images' states."""
        assert inputs.images is not None
        places, regions = padded_places(inputs.images, None)
        first, *rest = self.regions(model, replace(inputs, looked_at=None))
        own = places if inputs.shared is None else places[inputs.shared.first]
        return [first.looking_at(own, regions), *(one.looking_at(places, regions) for one in rest)]

    def generate(
        self, model: nn.Module, ids: Tensor, real: Tensor, images: Sequence[ImageInputs | None] | None, **options: Any
    ) -> Tensor:
        """With what goes by token of images beside the prompts' tokens."""
        seen = None
        if images is not None and any(images):
            seen = ImageArguments.of(model, images, ids, real, torch.zeros_like(real))
        more = {} if seen is None else {**seen.by_token, **seen.tensors, "images": tuple(seen.tensors)}
        return model.generate(input_ids=ids, attention_mask=real.long(), **more, **options)

    def answer_start(self, model: nn.Module, prompt_width: int) -> int:
        """Behind the prompt."""
        return prompt_width

    def text_before(self, prompt: str) -> str:
        """The prompt: the answer is written behind it."""
        return prompt

    def text_of(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """Behind a prompt the first token's space is part of the answer."""
        return continuation_text(tokenizer, ids)


def _prefix_pass(
    model: nn.Module,
    fed: PassInputs,
    shared: SharedPrompts,
    response: Tensor,
    mask: Tensor,
    images: ImageArguments | None,
) -> Tensor:
    """The same logits: a prompt's last position predicts every answer's first token, its cache serves the others."""
    first, of_row = shared.first, shared.of_row
    lengths, width = None if fed.lengths is None else fed.lengths[first], fed.prompt_ids.shape[1]
    seen = {} if images is None else images.of_forward(first, slice(0, width), with_images=True)
    output = forward(model, fed.prompt_ids[first], fed.prompt_real[first], 1, lengths, use_cache=True, **seen)
    logits = output.logits[:, -1:].index_select(0, of_row)
    if response.shape[1] == 0:
        return logits
    cache = output.past_key_values
    cache.reorder_cache(of_row)
    after = {} if images is None else images.of_forward(None, slice(width, None), with_images=False)
    rest = forward(
        model, response, mask, response.shape[1], fed.lengths, past_key_values=cache, use_cache=True, **after
    )
    return torch.cat([logits, rest.logits], dim=1)


def forward(model: nn.Module, ids: Tensor, mask: Tensor, keep: int, lengths: Tensor | None = None, **more: Any) -> Any:
    """A decoder-only forward over ``ids`` ``(rows, fed)`` int64, the last positions of ``mask`` ``(rows, seen)`` bool,
    cached ones included.

    ``keep`` of the last positions need logits; ``lengths`` ``(rows,)`` are the tokens by which rotary frequencies go.
    ``more`` is ``past_key_values`` and ``use_cache`` (without: no cache is made), and what is handed of images.
    """
    mask = mask.long()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's own forward takes anything
    accepted = inspect.signature(base.forward).parameters
    arguments: dict[str, Any] = {"use_cache": False, **more}
    if "position_ids" in accepted and "position_ids" not in arguments:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    with nullcontext() if lengths is None else read_as_long_as(lengths):
        return model(input_ids=ids, attention_mask=mask, **arguments)


def of_batch(found: Tensor, held_by: Tensor | None) -> Tensor:
    """What was found for each token of the rows fed, ``(fed, response, ...)``, as ``(batch, response, ...)``.

    ``held_by`` is what ``rows_fed`` gave beside them.
    """
    if held_by is None:
        return found
    width = found.shape[1]
    return found[held_by[:, :width], torch.arange(width, device=found.device)]
