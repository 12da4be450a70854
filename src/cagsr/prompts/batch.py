"""Encoded prompts padded into tensors."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from cagsr.flow import EncodedPrompt, ImageInputs, PromptBatch


def collate_prompts(
    encoded: Sequence[EncodedPrompt],
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"],
    num_generations: int = 1,
    device: torch.device | str = "cpu",
    first_group: int = 0,
    images: Sequence[ImageInputs | None] = (),
) -> PromptBatch:
    """Pad prompts to one length, each repeated ``num_generations`` times in a row.

    Decoder-only models need ``padding_side="left"`` (the answer must follow the prompt), encoder-decoder models
    ``"right"``. The result has ``len(encoded) * num_generations`` sequences: ``ids``, ``real`` and ``words``
    ``(batch, prompt)``, ``salience`` ``(batch, words)`` float32, ``group`` ``(batch,)`` = ``first_group``,
    ``first_group + 1``, ... with one number a prompt. ``images`` are those of each prompt, none where it is empty.
    Padding holds ``pad_token_id``, False, -1 and 0. ValueError without prompts.
    """
    if not encoded:
        raise ValueError("collate_prompts needs at least one prompt")

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(num_generations, dim=0).to(device)

    def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype, value: float, side: str) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return repeat(pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side))

    return PromptBatch(
        prompts=tuple(one.prompt for one in encoded for _ in range(num_generations)),
        ids=padded([one.ids for one in encoded], torch.int64, pad_token_id, padding_side),
        real=padded([[True] * len(one.ids) for one in encoded], torch.bool, False, padding_side),
        words=padded([one.words for one in encoded], torch.int64, -1, padding_side),
        salience=padded([one.salience for one in encoded], torch.float32, 0, "right"),
        group=repeat(torch.arange(first_group, first_group + len(encoded))),
        images=tuple(one for one in images for _ in range(num_generations)) if any(images) else None,
    )
