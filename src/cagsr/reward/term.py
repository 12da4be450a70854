"""What a reward term is: a name and a call from a batch to numbers, and what it needs to be asked.

A term of your own needs no base class::

    class Exclamations:
        name = "exclamations"
        needs = frozenset()  # nothing but the answers: no attention is read for it

        def __call__(self, batch: RewardBatch) -> Tensor:  # (batch,)
            return torch.tensor([text.count("!") for text in batch.episodes.completions])

It may look at everything in the batch: texts, ids, masks, log-probabilities, entropies, the attention (which the loop reads in
a pass that runs anyway). A dense term returns ``(batch, response)``: what each token is paid; the term's value is the sum over
the answer. Of an episode of several turns every answer is a row of its own, whose context is all that stands before it.

Name it in ``reward.functions`` by its dotted path, or register it (:mod:`cagsr.reward.registry`), which gives it a section of
the settings.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from cagsr.flow import RewardBatch

ATTENTION = "attention"
"""The term looks at ``batch.attention``."""
REFERENCE = "reference"
"""The term looks at ``batch.reference_logprobs``."""
SUPPORT = "support"
"""The term looks at ``batch.readings.support``: the grounding probe's (``reward/learn_probe.py``)."""
UNKNOWN = frozenset({ATTENTION, REFERENCE})
"""What a term may need that does not say."""


@dataclass(frozen=True)
class PartialValues:
    """The values of a term that does not apply to every answer (TRL: a reward function that returns None)."""

    values: Tensor
    """(batch,) values; those of answers the term does not apply to are never read."""
    applies: Tensor
    """(batch,) bool: the term applies to this answer."""


@runtime_checkable
class RewardTerm(Protocol):
    """One term of the reward.

    It may say more of itself, as class attributes: ``needs``, a frozenset of :data:`ATTENTION`, :data:`REFERENCE` and, for
    registered terms, the names of :class:`~cagsr.reward.registry.Resources` (without it the first two are assumed);
    ``by_micro_batch``, True where an answer's value depends on that answer alone: then no attention map outlives its
    micro-batch; ``turns`` (or a setting of that name), over which turns of an episode it looks: ``all`` before the answer, the
    ``first`` (the prompt), or the ``latest`` (what was said to it last);
    ``by_episode``, True where a term says something of an episode as a whole, and so is compared with what it says of the prompt's
    other episodes, however many turns they had;
    ``by_group``, True where an answer's value depends on the other answers to its prompt: the term reads texts and groups
    alone, and is asked of all answers at once.
    """

    @property
    def name(self) -> str:
        """What the term is called in the metrics (``rewards/<name>/mean``); a plain attribute will do."""
        ...

    def __call__(self, batch: RewardBatch, /) -> Tensor | PartialValues:
        """Return ``(batch,)``, or dense ``(batch, response)``, or :class:`PartialValues`; every number finite."""
        ...


def needs_of(term: RewardTerm) -> frozenset[str]:
    """What the term says it needs; everything where it does not say."""
    return frozenset(getattr(term, "needs", UNKNOWN))


def by_group(term: RewardTerm) -> bool:
    """Whether the term compares the answers to a prompt with each other."""
    return bool(getattr(term, "by_group", False))


def by_micro_batch(term: RewardTerm) -> bool:
    """Whether the term reads the attention and can be worked out of each micro-batch alone."""
    needs = needs_of(term)
    return bool(getattr(term, "by_micro_batch", False)) and ATTENTION in needs and REFERENCE not in needs
