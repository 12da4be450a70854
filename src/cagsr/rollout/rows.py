"""Some sequences of a rollout, cut to their own longest prompt and answer: a micro-batch without padding waste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from cagsr.flow import EncodedPrompt, PromptBatch, Rollout
from cagsr.models.load import LoadedModel
from cagsr.prompts.batch import collate_prompts


def rollout_rows(rollout: Rollout, index: Tensor) -> Rollout:
    """Select sequences and drop the columns that are padding in all of them.

    Prompts padded on the left lose columns on the left, prompts padded on the right lose them on the right.

    Args:
        rollout: prompts and answers.
        index: which sequences, ``(n,)`` int64, at least one.

    Returns:
        The same sequences in the order of ``index``: prompts ``(n, longest prompt)``, answers ``(n, longest answer)``.
    """
    prompts = rollout.prompts
    prompt_mask, response_mask = prompts.mask[index], rollout.response_mask[index]
    columns = prompt_mask.any(dim=0).nonzero().flatten()
    first, last = int(columns[0]), int(columns[-1]) + 1
    length = max(1, int(response_mask.sum(dim=1).max()))
    numbers = index.tolist()
    cut = replace(
        prompts,
        prompts=tuple(prompts.prompts[number] for number in numbers),
        ids=prompts.ids[index, first:last],
        mask=prompt_mask[:, first:last],
        words=prompts.words[index, first:last],
        salience=prompts.salience[index],
        group=prompts.group[index],
    )
    logprobs = rollout.sampler_logprobs
    return Rollout(
        prompts=cut,
        response_ids=rollout.response_ids[index, :length],
        response_mask=response_mask[:, :length],
        ended=rollout.ended[index],
        completions=tuple(rollout.completions[number] for number in numbers),
        sampler_logprobs=None if logprobs is None else logprobs[index, :length],
    )


def prompt_batch(
    loaded: LoadedModel, prompts: Sequence[EncodedPrompt], num_generations: int = 1, first_group: int = 0
) -> PromptBatch:
    """Pad prompts as a model reads them, each ``num_generations`` times in a row (:func:`collate_prompts`)."""
    return collate_prompts(
        prompts,
        pad_token_id=loaded.pad_token_id,
        padding_side=loaded.architecture.padding_side,
        num_generations=num_generations,
        device=loaded.device,
        first_group=first_group,
    )
