"""Some sequences of a rollout, cut to their own longest prompt and answer: a micro-batch without padding waste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cagsr.flow import Context, EncodedPrompt, EpisodeBatch, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.prompts.batch import collate_prompts


def episode_rows(episodes: EpisodeBatch, index: Tensor) -> EpisodeBatch:
    """Select sequences and drop the columns that are padding in all of them.

    Prompts padded on the left lose columns on the left, prompts padded on the right lose them on the right.

    Args:
        episodes: prompts and what followed them.
        index: which sequences, ``(n,)`` int64, at least one.

    Returns:
        The same sequences in the order of ``index``: prompts ``(n, longest prompt)``, responses ``(n, longest response)``.
    """
    prompts, context = episodes.prompts, episodes.context
    real, response_real = prompts.real[index], episodes.real[index]
    columns = real.any(dim=0).nonzero().flatten()
    first, last = int(columns[0]), int(columns[-1]) + 1
    length = max(1, int(response_real.sum(dim=1).max()))
    numbers = index.tolist()
    if context is not None:
        width = prompts.ids.shape[1]
        words = context.words[index]
        context = Context(
            torch.cat([words[:, first:last], words[:, width : width + length]], dim=1),
            context.salience[index],
            context.word_turn[index],
            tuple(context.episodes[number] for number in numbers),
        )
    logprobs = episodes.sampler_logprobs
    return EpisodeBatch(
        prompts=replace(
            prompts,
            prompts=tuple(prompts.prompts[number] for number in numbers),
            ids=prompts.ids[index, first:last],
            real=real[:, first:last],
            words=prompts.words[index, first:last],
            salience=prompts.salience[index],
            group=prompts.group[index],
        ),
        ids=episodes.ids[index, :length],
        real=response_real[:, :length],
        sampled=episodes.sampled[index, :length],
        turn=episodes.turn[index, :length],
        ended=episodes.ended[index],
        completions=tuple(episodes.completions[number] for number in numbers),
        sampler_logprobs=None if logprobs is None else logprobs[index, :length],
        context=context,
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
