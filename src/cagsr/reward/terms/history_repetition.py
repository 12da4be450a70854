"""History repetition: the share of an answer's n-grams that were said before in the conversation.

A policy that is paid for the words of the whole history is paid for saying its last answer once more: this is what that
costs. By words, not tokens, because answers in the data and the model's own come by different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from cagsr.config.ranges import PositiveInt
from cagsr.flow import EpisodeBatch, RewardBatch
from cagsr.prompts.find_words import find_words
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class HistoryRepetitionConfig(TermConfig):
    """History repetition: share of the answer's n-grams of words that earlier answers have already said."""

    n: PositiveInt = 3
    """Length of the n-grams, in words."""
    of: Literal["answers", "all"] = "answers"
    """Whose n-grams count as said before: earlier answers' (the model's own, or those of the data), or everybody's."""


@register
@dataclass(frozen=True)
class HistoryRepetition:
    """History repetition, :func:`said_before`; 0 for a first answer."""

    name: ClassVar[str] = "history_repetition"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 12
    settings: HistoryRepetitionConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""
        episodes, answers_only = batch.episodes, self.settings.of == "answers"
        values = [
            said_before(text, history(episodes, row, answers_only), self.settings.n)
            for row, text in enumerate(episodes.completions)
        ]
        return torch.tensor(values, dtype=torch.float32, device=episodes.ids.device)

    @staticmethod
    def advice(settings: HistoryRepetitionConfig, reward: RewardConfig) -> Iterator[str]:
        """A penalty is negative."""
        if settings.weight > 0:
            yield "history_repetition has a positive weight, which pays for saying the same again: a penalty has a negative one."


def history(episodes: EpisodeBatch, row: int, answers_only: bool) -> list[str]:
    """What was said before the answer of a row: by earlier answers, or by everybody. A plain prompt is no answer."""
    context = episodes.context
    prompt = episodes.prompts.prompts[row] if context is None else context.episodes[row].first.prompt
    messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else prompt.messages
    told = [(str(one["role"]), str(one["content"] or "")) for one in messages]
    if context is not None:
        # An answer without a token, which has no turn, there is in a first turn alone.
        turn = int(torch.where(episodes.sampled[row], episodes.turn[row], 0).max())
        since = context.episodes[row].segments
        told += [(one.role, one.text) for one in since if one.turn < turn or (one.turn == turn and not one.sampled)]
    return [text for role, text in told if role == "assistant" or not answers_only]


def said_before(answer: str, before: Sequence[str], n: int) -> float:
    """Share of the n-grams of ``answer``'s words, each occurrence counted, that a text in ``before`` holds; 0 where it has none."""
    own = _grams(answer, n)
    held = {gram for text in before for gram in _grams(text, n)}
    return sum(gram in held for gram in own) / max(len(own), 1)


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = [word.key for word in find_words(text)]
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
