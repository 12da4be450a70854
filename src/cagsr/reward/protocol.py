"""What a reward term is: a name and a call from a batch to numbers.

A term of your own needs no base class::

    class Exclamations:
        name = "exclamations"

        def __call__(self, batch: RewardBatch) -> Tensor:  # (batch,)
            return torch.tensor([text.count("!") for text in batch.rollout.completions])

It may look at everything in the batch: texts, ids, masks, log-probabilities, entropies, the prompt attention (which
the loop has read already, so that looking at it costs no forward pass). A dense term returns ``(batch, response)``:
what each token is paid; the term's value is the sum over the answer. Name it in ``reward.functions`` by its dotted
path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from cagsr.flow import RewardBatch


@dataclass(frozen=True)
class Partial:
    """The values of a term that does not apply to every answer (TRL: a reward function that returns None)."""

    values: Tensor
    """(batch,) values; those of answers the term does not apply to are never read."""
    applies: Tensor
    """(batch,) bool: the term applies to this answer."""


@runtime_checkable
class RewardTerm(Protocol):
    """One term of the reward."""

    @property
    def name(self) -> str:
        """What the term is called in the metrics (``rewards/<name>/mean``); a plain attribute will do."""
        ...

    def __call__(self, batch: RewardBatch, /) -> Tensor | Partial:
        """Return ``(batch,)``, or dense ``(batch, response)``, or :class:`Partial`; every number finite."""
        ...
