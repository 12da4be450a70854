"""Sample answers to a list of prompts, batch by batch, without touching the global random generators."""

from collections.abc import Iterator, Sequence

import torch

from cagsr.config import SamplingConfig
from cagsr.flow import EncodedPrompt, EpisodeBatch
from cagsr.models.load import LoadedModel
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.support.progress import working


def sample_in_batches(
    loaded: LoadedModel, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig, seed: int, batch_size: int
) -> Iterator[tuple[Sequence[EncodedPrompt], EpisodeBatch]]:
    """Yield some prompts at a time, ``batch_size``, with ``sampling.num_generations`` answers to each.

    The same seed and batch size give the same answers.
    """
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with working("answering", len(prompts), "prompts") as task:
        for number, start in enumerate(range(0, len(prompts), batch_size)):
            some = prompts[start : start + batch_size]
            batch = prompt_batch(loaded, some, sampling.num_generations, first_group=start)
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed + 7919 * number)
                rollout = sample_responses(loaded, batch, sampling)
            yield some, rollout
            task.advance(len(some))  # whoever asks for more has done with these
