"""Ask one term for its values and check them before anything is computed from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.errors import CagsrError, RewardError
from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.protocol import Partial, RewardTerm


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


def term_values(term: RewardTerm, batch: RewardBatch) -> TermValues:
    """Call a term and check what it returns.

    Raises:
        RewardError: the term raises, returns another shape than ``(batch,)`` or ``(batch, response)``, or a number
            that is not finite; the message names the term and, for a number, the prompt.
    """
    mask = batch.rollout.response_mask
    try:
        given = term(batch)
    except CagsrError:
        raise
    except Exception as error:  # a user's code can raise anything; the cause stays attached
        raise RewardError(
            f"reward term {term.name!r} failed with {type(error).__name__}: {error}; mend the term or take it out of "
            "the reward"
        ) from error
    values, applies = (given.values, given.applies) if isinstance(given, Partial) else (given, None)
    if not isinstance(values, Tensor):
        raise RewardError(
            f"reward term {term.name!r} returned {type(values).__name__}, a tensor of shape (batch,) or "
            "(batch, response) was expected"
        )
    values = values.detach().to(mask.device, torch.float32)
    everywhere = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
    applies = everywhere if applies is None else applies.to(mask.device, torch.bool)
    dense = values.shape == mask.shape
    if applies.shape != mask.shape[:1] or not (dense or values.shape == mask.shape[:1]):
        raise RewardError(
            f"reward term {term.name!r} returned shape {tuple(values.shape)} for {mask.shape[0]} answers of up to "
            f"{mask.shape[1]} tokens; return (batch,) or (batch, response)"
        )
    if dense:
        values = torch.where(mask & applies[:, None], values, 0.0)
    total = torch.where(applies, values.sum(dim=1) if dense else values, 0.0)
    bad = (~torch.isfinite(total)).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise RewardError(
            f"reward term {term.name!r} gave {float(total[row])} for "
            f"{quote_prompt(batch.rollout.prompts.prompts[row])}; every value must be a finite number"
        )
    return TermValues(total=total, tokens=values if dense else None, applies=applies)
