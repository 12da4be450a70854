"""The scoring pass, compared with the plain one while training: by one row a step.

A prompt that is read once for all its answers saves much of a step, and is the same to the last digits, or it is wrong in
a way that nothing else shows: the ratio of the update's pass to the scoring pass stays 1, because both are wrong alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch, Readings
from cagsr.models.checkpointing import without_checkpointing
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.sharing import shares_prompts, stop_sharing
from cagsr.rollout.rows import episode_rows
from cagsr.scoring.engine_mismatch import beyond_rounding
from cagsr.scoring.micro_batches import micro_batches
from cagsr.scoring.statistics import logprobs_and

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Nats by which a token's log-probability may differ between the two passes."""


def compare_with_plain(
    readings: Readings,
    loaded: LoadedModel,
    episodes: EpisodeBatch,
    temperature: float,
    micro_batch_size: int,
    gather: Callable[[Tensor], Tensor],
) -> tuple[dict[str, float], str | None]:
    """Measure how far the scoring pass is from the plain one; where that is too far, share no prompts from now on.

    Every process calls it and all decide alike; the policy's weights are whole. Readings, temperature (> 0) and
    micro-batches are the scoring pass's; ``gather`` puts the tensors of all processes, ``(n,)`` each, behind each other.

    Gives the difference as a metric, none where no prompt was shared; and what to say where it is too large: the readings
    are wrong then and must be made again.
    """
    own = _plain_difference(loaded, episodes, readings.logprobs, temperature, micro_batch_size)
    # A process that has nothing to compare takes part with -1.
    found = gather(torch.tensor([-1.0 if own is None else own], device=loaded.device))
    difference = float(found.max())  # NaN where one is
    if difference < 0:
        return {}, None
    metrics = {"scoring/shared_prompt_logp_difference": beyond_rounding(difference)}
    if difference <= TOLERANCE[loaded.compute_dtype]:
        return metrics, None
    stop_sharing(loaded.model)
    return metrics, (
        f"Reading a prompt once for all its answers gives log-probabilities {difference:.2g} nats away from those of the "
        "plain pass: from this step on each prompt is read with each answer, which is slower."
    )


def _plain_difference(
    loaded: LoadedModel, episodes: EpisodeBatch, logprobs: Tensor, temperature: float, micro_batch_size: int
) -> float | None:
    """The largest difference of a token's log-probability, nats, in the longest row: prompt and answer in one forward.

    One forward of one row: cheap enough for every step. The weights move, and answers get longer, so what held at the
    first step need not hold later. None where the scoring pass was the plain one.
    """
    with torch.no_grad(), loaded.autocast(), without_checkpointing(loaded.model):
        if not shares_prompts(loaded, episodes):
            return None
        # Only of rows whose prompt really was read for several answers.
        chunks = micro_batches(episodes, micro_batch_size, share=True)
        shared = [
            chunk for chunk in chunks if PassInputs.of(episode_rows(episodes, chunk), share=True).shared is not None
        ]
        if not shared:
            return None
        rows = torch.cat(shared)
        lengths = episodes.prompts.real.sum(dim=1) + episodes.real.sum(dim=1)
        row = rows[lengths[rows].argmax()][None]
        part = episode_rows(episodes, row)
        statistics = logprobs_and(temperature=temperature)
        found = loaded.token_statistics(PassInputs.of(part), statistics, part.sampled)[..., 0]
        return float((found - logprobs[row, : found.shape[1]]).abs()[part.sampled].max())
