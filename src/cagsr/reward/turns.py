"""Episodes of several turns as exchanges: each answer a row of its own, with all that stands before it as its context.

So a term is written for one answer, and judges conversations and steps as it judges single answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cagsr.flow import Context, EpisodeBatch, Returns, RewardBatch
from cagsr.reward.term import RewardTerm
from cagsr.rollout.rows import take_rows
from cagsr.tasks.history import prompt_before

Turns = Literal["all", "first", "latest"]


@dataclass(frozen=True)
class Exchanges:
    """The answers of a batch of episodes, a row each; of one turn the batch itself."""

    batch: RewardBatch
    group: Tensor
    """``(answers,)`` int64: answers with the same number stand in the same turn of the same prompt."""
    row: Tensor | None = None
    """``(answers,)`` int64: the episode of each answer; None: the batch was of one turn."""
    turn: Tensor | None = None
    """``(answers,)`` int64: its turn."""
    size: tuple[int, int] = (0, 1)
    """Episodes and turns."""

    @classmethod
    def of(cls, batch: RewardBatch) -> Exchanges:
        """Take episodes apart."""
        episodes = batch.episodes
        if episodes.context is None:
            return cls(batch, episodes.prompts.group, size=(len(episodes.ids), 1))
        turns = 1 + int(torch.where(episodes.sampled, episodes.turn, 0).max())
        there = torch.stack([(episodes.sampled & (episodes.turn == turn)).any(dim=1) for turn in range(turns)], dim=1)
        row, turn = there.nonzero(as_tuple=True)
        return cls(
            _answers(batch, row, turn), episodes.prompts.group[row] * turns + turn, row, turn, (len(there), turns)
        )

    @property
    def alone(self) -> Tensor:
        """``(answers,)`` bool: the only answer in a later turn of its prompt, which has nothing to be compared with."""
        if self.turn is None:
            return torch.zeros_like(self.group, dtype=torch.bool)
        _, own, counts = torch.unique(self.group, return_inverse=True, return_counts=True)
        return (counts[own] == 1) & (self.turn > 0)

    def group_of(self, term: RewardTerm) -> Tensor:
        """``(answers,)`` int64: with which answers those of a term are compared, by its attribute ``by_episode``."""
        if self.row is None or not getattr(term, "by_episode", False):
            return self.group
        return self.batch.episodes.prompts.group

    def seen_by(self, term: RewardTerm) -> RewardBatch:
        """The batch with the words of those turns alone that the term looks over (its attribute or setting ``turns``)."""
        turns: Turns = getattr(term, "turns", getattr(getattr(term, "settings", None), "turns", "all"))
        context = self.batch.episodes.context
        if turns == "all" or context is None or self.turn is None:
            return self.batch
        wanted = 0 if turns == "first" else self.turn[:, None]
        return replace(
            self.batch, episodes=replace(self.batch.episodes, context=_only(context, context.word_turn == wanted))
        )

    def folded(
        self, total: Tensor, per_token: Tensor, terms: Mapping[str, Tensor], contributions: Mapping[str, Tensor]
    ) -> Returns:
        """Put what the answers were paid together by episode."""
        if self.row is None or self.turn is None:
            return Returns(total, per_token, total[:, None], terms, contributions)
        row, episodes = self.row, self.size[0]

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(episodes, *values.shape[1:]).index_add(0, row, values)

        def mean(values: Tensor) -> Tensor:
            known = torch.isfinite(values)
            counts = summed(known.to(values.dtype))
            return summed(torch.where(known, values, 0.0)) / counts  # 0 / 0 is NaN: does not apply

        by_turn = total.new_zeros(self.size).index_put((row, self.turn), total)
        return Returns(
            summed(total),
            summed(per_token),
            by_turn,
            {name: mean(values) for name, values in terms.items()},
            {name: summed(values) for name, values in contributions.items()},
        )


def is_last(episodes: EpisodeBatch) -> Tensor:
    """Whether each row, an answer, is the last of its episode, ``(answers,)`` bool."""
    if episodes.context is None:
        return torch.ones(len(episodes.ids), dtype=torch.bool, device=episodes.ids.device)
    turn = torch.where(episodes.sampled, episodes.turn, 0).amax(dim=1)
    last = [len(episode.answers) - 1 for episode in episodes.context.episodes]
    return turn == torch.tensor(last, device=turn.device)


def said_so_far(episodes: EpisodeBatch) -> Tensor:
    """``(answers, response)`` bool: what the model has said of each episode by the end of the row's own answer."""
    if episodes.context is None or episodes.context.said is None:
        return episodes.sampled
    own = torch.where(episodes.sampled, episodes.turn, -1).amax(dim=1)
    return episodes.context.said & (episodes.turn <= own[:, None])


def _answers(batch: RewardBatch, row: Tensor, turn: Tensor) -> RewardBatch:
    """Each answer with its own tokens as the only sampled ones, and the words that stand before it as its context."""
    asked = batch.episodes
    there = [(asked.sampled & (asked.turn == number)).any(dim=1) for number in range(int(turn.max()) + 2)]
    is_last = ~torch.stack(there, dim=1)[row, turn + 1]
    picked = take_rows(batch, row)
    episodes, context = picked.episodes, picked.episodes.context
    assert context is not None
    own = episodes.sampled & (episodes.turn == turn[:, None])
    told = zip(episodes.prompts.prompts, context.episodes, turn.tolist(), strict=True)
    prompts = tuple(prompt_before(prompt, episode, number) for prompt, episode, number in told)
    answers = replace(
        episodes,
        prompts=replace(episodes.prompts, prompts=prompts),
        real=own,
        sampled=own,
        ended=torch.where(is_last, episodes.ended, True),  # an answer that was cut ends its episode
        completions=tuple(
            episode.answers[number] for episode, number in zip(context.episodes, turn.tolist(), strict=True)
        ),
        context=_faded(_only(replace(context, said=episodes.sampled), context.word_turn <= turn[:, None]), turn),
    )
    return replace(picked, episodes=answers)


def _faded(context: Context, turn: Tensor) -> Context:
    """The context with the weights that its words have by ``turn`` ``(batch,)``: less for each turn since they were said."""
    if context.turn_decay == 1.0:
        return context
    age = (turn[:, None] - context.word_turn).clamp(min=0)
    salience = context.salience * context.turn_decay**age
    return _only(replace(context, salience=salience), salience > 0)


def _only(context: Context, counts: Tensor) -> Context:
    """The context with some of its words alone; ``counts`` ``(batch, words)`` bool."""
    there = counts.gather(1, context.words.clamp(min=0)) & (context.words >= 0)
    return replace(
        context,
        words=context.words.masked_fill(~there, -1),
        salience=context.salience.masked_fill(~counts, 0.0),
    )
