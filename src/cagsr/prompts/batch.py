"""Encoded prompts padded into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cagsr.flow import EncodedPrompt, PromptBatch


def collate_prompts(
    encoded: Sequence[EncodedPrompt],
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"],
    num_generations: int = 1,
    device: torch.device | str = "cpu",
    first_group: int = 0,
) -> PromptBatch:
    """Pad prompts to one length, each repeated ``num_generations`` times in a row.

    Decoder-only models need ``padding_side="left"`` (the answer must follow the prompt), encoder-decoder models
    ``"right"``. The result has ``len(encoded) * num_generations`` sequences: ``ids``, ``mask`` and ``words``
    ``(batch, prompt)``, ``salience`` ``(batch, words)`` float32, ``group`` ``(batch,)`` = ``first_group``,
    ``first_group + 1``, ... with one number a prompt. Padding holds ``pad_token_id``, False, -1 and 0.

    Raises:
        ValueError: no prompts, or ``num_generations`` below 1.
    """
    if not encoded or num_generations < 1:
        raise ValueError("collate_prompts needs at least one prompt and num_generations of 1 or more")
    length = max(len(one.ids) for one in encoded)
    width = max(len(one.salience) for one in encoded)
    ids = torch.full((len(encoded), length), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(encoded), length), dtype=torch.bool)
    words = torch.full((len(encoded), length), -1, dtype=torch.int64)
    salience = torch.zeros((len(encoded), width), dtype=torch.float32)
    for row, one in enumerate(encoded):
        size = len(one.ids)
        place = slice(length - size, length) if padding_side == "left" else slice(0, size)
        ids[row, place] = torch.tensor(one.ids, dtype=torch.int64)
        mask[row, place] = True
        words[row, place] = torch.tensor(one.words, dtype=torch.int64)
        salience[row, : len(one.salience)] = torch.tensor(one.salience, dtype=torch.float32)
    group = torch.arange(first_group, first_group + len(encoded), dtype=torch.int64)

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(num_generations, dim=0).to(device)

    return PromptBatch(
        prompts=tuple(one.prompt for one in encoded for _ in range(num_generations)),
        ids=repeat(ids),
        real=repeat(mask),
        words=repeat(words),
        salience=repeat(salience),
        group=repeat(group),
    )
