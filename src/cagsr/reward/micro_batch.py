"""What is kept of the attention while it is read: the terms' values, or the maps for terms that must see them all.

A map is as wide as the prompt: kept for a whole batch of long prompts, and pooled and compared there, it can outweigh
the model. Terms that look at one answer at a time are worked out where the attention is read, and the map is dropped with its
micro-batch.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from cagsr.errors import CagsrError
from cagsr.flow import Attention, EpisodeBatch, Readings, RewardBatch
from cagsr.models.image_arguments import region_weights
from cagsr.reward.pooling import pool_pieces
from cagsr.reward.term import ATTENTION, RewardTerm, by_micro_batch, needs_of
from cagsr.reward.values import RawValues, ask

Pooling = Literal["sum", "max"]


class TermVisitor:
    """Takes in the attention of micro-batches of ``episodes``, as a scoring pass reads it, and gives what is kept of them
    all.

    ``pooling`` says how the pieces of a word are put together; ``keep_maps`` keeps the maps whatever the terms are.
    """

    def __init__(
        self, episodes: EpisodeBatch, terms: Sequence[RewardTerm], pooling: Pooling, *, keep_maps: bool = False
    ) -> None:
        self._episodes, self._pooling = episodes, pooling
        # Of several turns each answer is judged apart, once all is read.
        at_once = episodes.context is None and not keep_maps
        self._terms = [term for term in terms if at_once and by_micro_batch(term)]
        later = [term for term in terms if not (at_once and by_micro_batch(term))]
        self._maps: Tensor | None = None
        if keep_maps or any(ATTENTION in needs_of(term) for term in later):
            self._maps = torch.zeros(*episodes.ids.shape, episodes.words.shape[1], device=episodes.ids.device)
        self._regions: Tensor | None = None
        if self._maps is not None and any(episodes.prompts.images or ()):
            regions = region_weights(episodes.prompts.images or ()).shape[1]
            self._regions = torch.zeros(*episodes.ids.shape, regions, device=episodes.ids.device)
        self._values: dict[str, RawValues] = {}
        self._failures: dict[str, CagsrError] = {}

    def visit(
        self, index: Tensor, part: EpisodeBatch, readings: Readings, attention: Tensor, regions: Tensor | None = None
    ) -> None:
        """Take in a micro-batch; arguments as :meth:`cagsr.scoring.scorer.Visitor.visit`."""
        response = attention.shape[1]
        if self._maps is not None:
            # The columns that were cut, on whichever side, are padding in all of these rows.
            first = int(self._episodes.prompts.real[index].any(dim=0).nonzero()[0])
            self._maps[index, :response, first : first + attention.shape[2]] = attention
            if self._regions is not None and regions is not None:
                self._regions[index, :response, : regions.shape[2]] = regions
        if not self._terms:
            return
        words = pool_pieces(attention, part.words, part.salience.shape[1], self._pooling)
        batch = RewardBatch(part, readings, None, Attention(attention, words, regions))
        for term in self._terms:
            try:
                found = ask(term, batch)
            except CagsrError as error:  # told once all processes are at the same place
                self._failures.setdefault(term.name, error)
                continue
            kept = self._values.get(term.name)
            if kept is None:
                shape = self._episodes.ids.shape if found.dense else self._episodes.ids.shape[:1]
                kept = RawValues.empty(shape, self._episodes.ids.device)
                self._values[term.name] = kept
            kept.put(index, found)

    @property
    def wants_attention(self) -> bool:
        """Whether anything is made of it at all."""
        return self._maps is not None or bool(self._terms)

    @property
    def values(self) -> Mapping[str, RawValues | CagsrError]:
        """What each term gave that was worked out, or why it failed."""
        return {**self._values, **self._failures}

    def attention(self) -> Attention | None:
        """The maps that were kept, with the pieces of words pooled; None: none were."""
        if self._maps is None:
            return None
        words = pool_pieces(self._maps, self._episodes.words, self._episodes.salience.shape[1], self._pooling)
        return Attention(self._maps, words, self._regions)
