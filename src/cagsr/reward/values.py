"""Ask one term for its values and check them before anything is computed from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.errors import CagsrError, RewardError
from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.term import ATTENTION, PartialValues, RewardTerm


@dataclass(frozen=True)
class RawValues:
    """What a term returned, of a known shape, not yet looked at."""

    values: Tensor  # (batch,), or dense (batch, response), float32
    applies: Tensor  # (batch,) bool

    @property
    def dense(self) -> bool:
        """Whether each token has a value."""
        return self.values.dim() == 2

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device) -> RawValues:
        """Zeros, to be filled by :meth:`put`."""
        return cls(torch.zeros(shape, device=device), torch.ones(shape[0], dtype=torch.bool, device=device))

    def put(self, index: Tensor, part: RawValues) -> None:
        """Put in the values of some rows, dense ones as wide as theirs are."""
        self.applies[index] = part.applies
        if part.dense:
            self.values[index, : part.values.shape[1]] = part.values
        else:
            self.values[index] = part.values


@dataclass(frozen=True)
class TermValues:
    """What one term gave for a batch, finite; float32 from a call of the term."""

    total: Tensor  # (batch,) value of each answer; 0 where the term does not apply
    tokens: Tensor | None  # (batch, response) gains of a dense term, 0 on masked tokens; None: sequence-level
    applies: Tensor  # (batch,) bool

    @classmethod
    def of(cls, raw: Tensor) -> TermValues:
        """From values that were read before: ``(batch,)``, NaN where the term does not apply."""
        applies = torch.isfinite(raw)
        return cls(torch.where(applies, raw, 0.0), None, applies)

    @property
    def raw(self) -> Tensor:
        """``(batch,)`` the value, NaN where the term does not apply."""
        return torch.where(self.applies, self.total, torch.nan)


def quote_prompt(prompt: Prompt) -> str:
    """Name a prompt in a message: its row and its first 80 characters on one line."""
    return f"the prompt of row {prompt.row} ({' '.join(prompt.text.split())[:80]!r})"


def ask(term: RewardTerm, batch: RewardBatch) -> RawValues:
    """Call a term.

    RewardError, which names it: it raises, looks at attention that was not read, or returns another shape than ``(batch,)`` or
    ``(batch, response)``.
    """
    if ATTENTION in getattr(term, "needs", ()) and batch.attention is None:
        raise RewardError(f"reward term {term.name!r} reads the attention, but none was captured for this batch")
    mask = batch.episodes.sampled
    try:
        given = term(batch)
    except CagsrError:
        raise
    except Exception as error:  # a user's code can raise anything; the cause stays attached
        unread = " (its needs leave out the attention, so none was read)" if batch.attention is None else ""
        raise RewardError(
            f"reward term {term.name!r} failed with {type(error).__name__}: {error}{unread}; mend the term or take it out "
            "of the reward"
        ) from error
    values, applies = (given.values, given.applies) if isinstance(given, PartialValues) else (given, None)
    if not isinstance(values, Tensor):
        raise RewardError(
            f"reward term {term.name!r} returned {type(values).__name__}, a tensor of shape (batch,) or "
            "(batch, response) was expected"
        )
    values = values.detach().to(mask.device, torch.float32)
    everywhere = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
    applies = everywhere if applies is None else applies.to(mask.device, torch.bool)
    if applies.shape != mask.shape[:1] or values.shape not in (mask.shape, mask.shape[:1]):
        raise RewardError(
            f"reward term {term.name!r} returned shape {tuple(values.shape)} for {mask.shape[0]} answers of up to "
            f"{mask.shape[1]} tokens; return (batch,) or (batch, response)"
        )
    return RawValues(values, applies)


def checked_values(term: RewardTerm, found: RawValues, batch: RewardBatch) -> TermValues:
    """Look at what a term gave for a batch; RewardError, with term and prompt, for a number that is not finite."""
    values, applies, mask = found.values, found.applies, batch.episodes.sampled
    if found.dense:
        values = torch.where(mask & applies[:, None], values, 0.0)
    total = torch.where(applies, values.sum(dim=1) if found.dense else values, 0.0)
    bad = (~torch.isfinite(total)).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise RewardError(
            f"reward term {term.name!r} gave {float(total[row])} for "
            f"{quote_prompt(batch.episodes.prompts.prompts[row])}; every value must be a finite number"
        )
    return TermValues(total=total, tokens=values if found.dense else None, applies=applies)


def term_values(term: RewardTerm, batch: RewardBatch, known: RawValues | CagsrError | None = None) -> TermValues:
    """Call a term and check what it returns (:func:`ask`, :func:`checked_values`).

    ``known``: what it has given, or how it failed, while the attention was read; it is not called again.
    """
    if isinstance(known, CagsrError):
        raise known
    return checked_values(term, ask(term, batch) if known is None else known, batch)
