"""Micro-batches of sequences of like length, so that little of the work is padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch


def micro_batches(
    episodes: EpisodeBatch, size: int, index: Tensor | None = None, *, share: bool = False
) -> list[Tensor]:
    """Split sequences (``index`` ``(n,)`` int64; None: all) into index tensors of at most ``size``, which together are ``index``.

    ``share``: a prompt is fed once for all its answers in a micro-batch: of two orders, by the length of the answer and by
    prompt, take the one that feeds fewer positions.
    """
    if index is None:
        index = torch.arange(episodes.ids.shape[0], device=episodes.ids.device)
    prompts, responses = episodes.prompts.real.sum(dim=1)[index], episodes.real.sum(dim=1)[index]
    if not share:
        return list(index[torch.argsort(prompts + responses, stable=True)].split(size))
    group = episodes.prompts.group[index]
    _, of_row = torch.unique(group, return_inverse=True)
    longest = torch.zeros_like(responses).scatter_reduce(0, of_row, responses, "amax")[of_row]
    by_prompt = torch.argsort((longest + prompts) * (len(group) + 1) + of_row, stable=True)
    orders = [torch.argsort(responses, stable=True), by_prompt]
    return [
        index[part]
        for part in min(
            (order.split(size) for order in orders), key=lambda parts: _fed(parts, prompts, responses, group)
        )
    ]


def _fed(parts: Sequence[Tensor], prompts: Tensor, responses: Tensor, group: Tensor) -> int:
    """Positions that these micro-batches feed to the model, padding included, each prompt once."""
    return sum(
        len(group[part].unique()) * int(prompts[part].max()) + len(part) * int(responses[part].max()) for part in parts
    )
