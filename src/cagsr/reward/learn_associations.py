"""Learn the associations of a model's own answers, or read those of an earlier run: what training and diagnosis share."""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from cagsr.config import ANSWERS_AT_ONCE, AssociationsConfig, RewardConfig, SamplingConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.reward.association import Associations, learn_associations
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.support.processes import broadcast, gather_objects, split_between_processes
from cagsr.support.progress import working

FEWEST_PROMPTS = 20
"""Fewer prompts tell no word that goes with one of them from one that goes with all."""
NAME_A_FILE = "give reward.associations.path the associations.json of a cagsr train run."
SEED = 104_729
"""Added to the run's seed, so that these answers are not the first step's."""


@working("learning associations")
def associations_of(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    config: AssociationsConfig,
    *,
    seed: int,
    batch_size: int = ANSWERS_AT_ONCE,
    accelerator: Accelerator | None = None,
) -> Associations:
    """Read the associations that ``config.path`` names, or learn them from the starting model's answers to these prompts.

    ``config.answers`` answers are sampled as in training (``num_generations`` is not used), to as many different prompts as
    there are, ``batch_size`` at once. The same seed, model and prompts give the same associations; the global random
    generators are left as they were. The processes of ``accelerator`` divide the prompts, all call this and get the same.

    Raises ConfigError: fewer than ``FEWEST_PROMPTS`` prompts, or greedy sampling; DataError: the file can't be read or is
    something else.
    """
    if config.path is not None:
        path = Path(config.path)
        return broadcast(lambda: read_associations(path), accelerator)
    if len(prompts) < FEWEST_PROMPTS:
        raise ConfigError(
            f"Associations are learned from answers to {FEWEST_PROMPTS} prompts or more, and there are {len(prompts)}: give more "
            "prompts, name a file with --reward.associations.path, or set the weights of associated_coverage and "
            "unsupported to 0."
        )
    chosen = random.Random(seed).sample(list(prompts), min(len(prompts), config.answers))
    each = dataclasses.replace(
        sampling,
        num_generations=math.ceil(config.answers / len(chosen)),
        temperature=sampling.temperature or 1.0,
    )
    mine = split_between_processes(chosen, accelerator)
    rank = 0 if accelerator is None else accelerator.process_index
    found: list[tuple[tuple[str, tuple[tuple[int, int], ...]], str]] = []
    per_batch = max(1, batch_size // each.num_generations)
    for _, rollout in sample_in_batches(loaded, mine, each, seed + SEED + rank, per_batch):
        asked = [(prompt.text, prompt.template) for prompt in rollout.prompts.prompts]
        found += zip(asked, rollout.completions, strict=True)
    found = gather_objects(found, accelerator)
    return broadcast(
        lambda: learn_associations(
            [prompt for prompt, _ in found],
            [answer for _, answer in found],
            min_count=config.min_count,
            floor=config.floor,
        ),
        accelerator,
    )


def read_associations(path: Path) -> Associations:
    """Read an ``associations.json``; DataError, which names it, for no such file or one that holds something else."""
    try:
        return Associations.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable JSON file; name the associations.json of a cagsr train run.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def named_associations(reward: RewardConfig, why: str) -> Associations | None:
    """Read the file that ``reward.associations.path`` names, where no answers are sampled to learn from.

    ConfigError, a sentence that ends with ``why``, where the reward needs associations and none are named.
    """
    if reward.associations.path is not None:
        return read_associations(Path(reward.associations.path))
    if reward.needs("associations"):
        raise ConfigError(f"The reward needs associations, and no answers are sampled here to learn them from: {why}")
    return None
