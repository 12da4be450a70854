"""Rows of what flows: of its dataclasses as they are, of episodes cut to their own longest prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from cagsr.flow import EncodedPrompt, EpisodeBatch, ImageInputs, PromptBatch
from cagsr.prompts.batch import collate_prompts

if TYPE_CHECKING:
    from cagsr.models.load import LoadedModel

RowsT = TypeVar("RowsT")


def take_rows(given: RowsT, index: Tensor, width: int | None = None) -> RowsT:
    """Some rows, ``(n,)`` int64, of a dataclass of ``flow.py``: of its tensors, tuples, mappings and the dataclasses in it.

    ``width``: of their first columns alone, where all tensors in it are ``(batch, response)``.
    """
    numbers = index.tolist()

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index] if width is None else value[index, :width]
        if isinstance(value, tuple):
            return tuple(value[number] for number in numbers)
        if isinstance(value, Mapping):
            return {name: taken(one) for name, one in value.items()}
        return take_rows(value, index, width) if is_dataclass(value) else value

    found: Any = given
    return cast(RowsT, replace(found, **{name: taken(value) for name, value in vars(found).items()}))


def episode_rows(episodes: EpisodeBatch, index: Tensor) -> EpisodeBatch:
    """Select sequences, ``(n,)`` int64, at least one, and drop the columns that are padding in all of them.

    Prompts padded on the left lose columns on the left, prompts padded on the right lose them on the right: prompts are
    ``(n, longest prompt)``, responses ``(n, longest response)``.
    """
    width = episodes.prompts.ids.shape[1]
    part = take_rows(episodes, index)
    prompts, context = part.prompts, part.context
    columns = prompts.real.any(dim=0).nonzero().flatten()
    kept = slice(int(columns[0]), int(columns[-1]) + 1)
    length = max(1, int(part.real.sum(dim=1).max()))
    if context is not None:
        words = torch.cat([context.words[:, kept], context.words[:, width : width + length]], dim=1)
        context = replace(context, words=words)
    return replace(
        part,
        prompts=replace(prompts, ids=prompts.ids[:, kept], real=prompts.real[:, kept], words=prompts.words[:, kept]),
        ids=part.ids[:, :length],
        real=part.real[:, :length],
        sampled=part.sampled[:, :length],
        turn=part.turn[:, :length],
        sampler_logprobs=None if part.sampler_logprobs is None else part.sampler_logprobs[:, :length],
        decoded_logprobs=None if part.decoded_logprobs is None else part.decoded_logprobs[:, :length],
        context=context,
    )


def prompt_batch(
    loaded: LoadedModel, prompts: Sequence[EncodedPrompt], num_generations: int = 1, first_group: int = 0
) -> PromptBatch:
    """Pad prompts as a model reads them, each ``num_generations`` times in a row (:func:`collate_prompts`).

    The images of a prompt that stands several times are read once.
    """
    seen: dict[int, ImageInputs | None] = {}
    for one in prompts:
        if loaded.vision is not None and id(one) not in seen:
            seen[id(one)] = loaded.vision.inputs(one, loaded.device)
    return collate_prompts(
        prompts,
        pad_token_id=loaded.pad_token_id,
        padding_side=loaded.architecture.padding_side,
        num_generations=num_generations,
        device=loaded.device,
        first_group=first_group,
        images=[seen.get(id(one)) for one in prompts],
    )
