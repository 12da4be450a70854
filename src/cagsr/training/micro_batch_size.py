"""How many sequences are in memory at once: as set, or as many as fit, and fewer where they turn out not to.

What it is changes memory and speed, never the result: gradients of micro-batches are accumulated. So it may change on the way.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from cagsr.flow import EpisodeBatch
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.checkpointing import is_checkpointed
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.output_layer import NUMBERS_AT_ONCE
from cagsr.rollout.rows import episode_rows
from cagsr.scoring.statistics import logprobs_and
from cagsr.support.memory_at_hand import memory_at_hand
from cagsr.support.progress import say

SHARE = 0.6
"""Of the memory at hand, what micro-batches may take: others need some too, and what a backward pass makes on its way."""
BLOCKS = 6
"""Blocks of logits that exist at a time, at most."""
T = TypeVar("T")


class MicroBatchSize:
    """``ppo.micro_batch_size``: a number, or ``auto``."""

    def __init__(self, setting: int | Literal["auto"]) -> None:
        self.auto = setting == "auto"
        self.size = 1 if setting == "auto" else setting
        self._room = 0.0
        self._per_token = 0.0
        self._longest = 0

    def choose(
        self, actor_critic: ActorCritic, loaded: LoadedModel, episodes: EpisodeBatch, gather: Callable[[Tensor], Tensor]
    ) -> None:
        """Set the size for these episodes; every process calls it, and all come to the same. Nothing to do without ``auto``.

        What a token takes is measured once, by a pass of one sequence whose kept tensors are counted; weights are whole here.
        """
        if not self.auto:
            return
        lengths = episodes.prompts.real.sum(dim=1) + episodes.real.sum(dim=1)
        longest = int(lengths.max())
        first = self._per_token == 0.0
        if first:
            free = memory_at_hand(loaded.device)
            self._per_token = (
                _kept_bytes(actor_critic, loaded, episode_rows(episodes, lengths.argmax()[None])) / longest
            )
            self._room = SHARE * (free - _still_to_come(actor_critic, loaded.device))
        self._longest = longest
        self.size = min(len(lengths), max(1, math.floor(self._room / (self._per_token * longest))))
        self.agree(gather, loaded.device)  # sharded models run equally often in all processes
        if first:
            say(
                f"Micro-batches (auto): {self.size} sequences of up to {longest} tokens at once; {free / 2**30:.1f} GiB are free, "
                f"and a token takes {self._per_token / 2**20:.2f} MiB."
            )

    def agree(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Have all processes go on with the smallest of their sizes: one of them may have halved its own in scoring."""
        if self.auto:
            self.size = int(gather(torch.tensor([self.size], device=device)).min())

    def fitting(self, work: Callable[[], T]) -> T:
        """``work()``, again with half as many sequences at once where memory ran out; ``work`` reads ``size`` anew."""
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not (self.auto and self.size > 1 and should_reduce_batch_size(error)):
                    raise
            # Not inside except: there the error still holds the pass that failed.
            clear_device_cache(garbage_collection=True)
            self.size //= 2
            self._room = self.size * self._per_token * self._longest
            say(f"Memory ran out with {2 * self.size} sequences at once: {self.size} from now on.")


def _kept_bytes(actor_critic: ActorCritic, loaded: LoadedModel, part: EpisodeBatch) -> int:
    """What a pass over these episodes keeps for its backward pass, weights aside."""
    there = {one.untyped_storage().data_ptr() for one in (*actor_critic.parameters(), *actor_critic.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), loaded.autocast(), torch.autograd.graph.saved_tensors_hooks(count, lambda one: one):
        found = actor_critic(PassInputs.of(part), logprobs_and(temperature=1.0), part.sampled)
    del found
    # A checkpointed layer's own are made again in the backward pass, about as much as is kept in all.
    return sum(kept.values()) * (2 if is_checkpointed(actor_critic) else 1)


def _still_to_come(actor_critic: ActorCritic, device: torch.device) -> int:
    """Bytes of gradients and Adam's moments, before the first step, and of blocks of logits."""
    trained = [one for one in actor_critic.parameters() if one.requires_grad]
    largest = max((one.numel() for one in trained), default=0)  # its gradient, once more, while it is made
    blocks = BLOCKS * NUMBERS_AT_ONCE.get(device.type, NUMBERS_AT_ONCE["cpu"])
    return 4 * (3 * sum(one.numel() for one in trained) + largest + blocks)
