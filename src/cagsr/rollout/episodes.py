"""Engine x task: answers are sampled, the task replies, and so on until it is over; then all of it as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cagsr.errors import ConfigError
from cagsr.flow import Context, EncodedPrompt, Episode, EpisodeBatch, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.turn_keys import TurnKeys
from cagsr.tasks.segments import SegmentEncoder
from cagsr.tasks.task import Task, replies_of


class Sample(Protocol):
    """Samples one answer to each row of a batch of prompts."""

    def __call__(self, prompts: PromptBatch, *, keys: TurnKeys | None = None) -> EpisodeBatch:
        """Sample; ``keys`` are what earlier turns have left there, and hold what this one leaves."""


class Player(Protocol):
    """Makes episodes with an engine that answers."""

    def __call__(self, sample: Sample, prompts: Sequence[EncodedPrompt], batch: PromptBatch) -> EpisodeBatch:
        """Play an episode for each row; ``batch`` holds the rows' prompts, padded."""


@dataclass(frozen=True)
class EpisodePlayer:
    """Plays a task of several turns with the policy ``loaded``; ``room`` is how many tokens may stand before an answer."""

    loaded: LoadedModel
    task: Task
    encoder: SegmentEncoder
    room: int

    def __post_init__(self) -> None:
        if not self.loaded.architecture.one_sequence:
            raise ConfigError(
                f"--rollout.task: {self.loaded.path} is an encoder-decoder model, whose encoder reads the prompt once; a task of "
                "several turns needs a decoder-only model."
            )

    def __call__(self, sample: Sample, prompts: Sequence[EncodedPrompt], batch: PromptBatch) -> EpisodeBatch:
        """Play an episode for each row with the engine ``sample``; ``batch`` holds the rows' prompts, padded.

        The episodes are in the order of the rows; where none had a second turn they are as those of one turn. RolloutError:
        the task fails, or a chat template can't go on.
        """
        logprobs: list[list[list[float] | None]] = [[] for _ in prompts]  # of each answer's tokens
        episodes = [Episode(prompt, (), True) for prompt in prompts]
        going, turn, keys = list(range(len(prompts))), 0, TurnKeys()
        found = first = sample(batch, keys=keys)
        while True:
            for place, row in enumerate(going):
                mask, drawn = found.real[place], found.decoded_logprobs
                answer = self.encoder.answer(found.ids[place][mask].tolist(), found.completions[place], turn)
                logprobs[row].append(None if drawn is None else drawn[place][mask].tolist())
                episodes[row] = replace(
                    episodes[row], segments=(*episodes[row].segments, answer), ended=bool(found.ended[place])
                )
            asked, going = going, self._going_on(episodes, going)
            if not going:
                break
            keys.pick([asked.index(row) for row in going])
            turn += 1
            # Each row is a group of its own now: answers to one prompt have different histories.
            found = sample(prompt_batch(self.loaded, [_so_far(episodes[row]) for row in going]), keys=keys)
        if turn == 0:
            return first
        return self._tensors(episodes, logprobs, batch)

    def _going_on(self, episodes: list[Episode], rows: Sequence[int]) -> list[int]:
        """Ask the task of the ``rows`` whose answers ended, put down what it says, and give those that go on."""
        asked = [row for row in rows if episodes[row].ended]
        going = []
        for row, text in zip(asked, replies_of(self.task, [episodes[row] for row in asked]), strict=True):
            if text is None:
                continue
            reply = self.encoder.reply(episodes[row], text)
            longer = replace(episodes[row], segments=(*episodes[row].segments, reply))
            if len(_so_far(longer).ids) <= self.room:  # else no room for another answer: the episode is over
                episodes[row] = longer
                going.append(row)
        return going

    def _tensors(
        self, episodes: list[Episode], logprobs: list[list[list[float] | None]], batch: PromptBatch
    ) -> EpisodeBatch:
        device = batch.ids.device
        rows = [[(one, number) for one in episode.segments for number in one.ids] for episode in episodes]
        width = max(map(len, rows))

        def padded(values: Sequence[Sequence[int | float]], fill: int | float, dtype: torch.dtype) -> Tensor:
            wide = [[*row, *[fill] * (width - len(row))] for row in values]
            return torch.tensor(wide, dtype=dtype, device=device)

        decoded: Tensor | None = None
        if not any(one is None for row in logprobs for one in row):
            drawn = [iter([x for one in row for x in one or ()]) for row in logprobs]
            by_token = [
                [next(own) if one.sampled else 0.0 for one, _ in row] for own, row in zip(drawn, rows, strict=True)
            ]
            decoded = padded(by_token, 0.0, torch.float32)
        return EpisodeBatch(
            prompts=batch,
            ids=padded([[number for _, number in row] for row in rows], self.loaded.pad_token_id, torch.int64),
            real=padded([[1] * len(row) for row in rows], 0, torch.bool),
            sampled=padded([[one.sampled for one, _ in row] for row in rows], 0, torch.bool),
            turn=padded([[one.turn for one, _ in row] for row in rows], 0, torch.int64),
            ended=torch.tensor([episode.ended for episode in episodes], device=device),
            completions=tuple(episode.answers[-1] for episode in episodes),
            decoded_logprobs=decoded,
            context=context_of(episodes, batch, width, self.encoder.salience.turn_decay),
        )


def played(player: Player | None, sample: Sample, prompts: Sequence[EncodedPrompt], batch: PromptBatch) -> EpisodeBatch:
    """One answer to each row, or, with a player, an episode for each; arguments as :meth:`EpisodePlayer.__call__`."""
    return sample(batch) if player is None else player(sample, prompts, batch)


def _so_far(episode: Episode) -> EncodedPrompt:
    """All that was said, as the prompt of the next answer."""
    ids = (*episode.first.ids, *(number for segment in episode.segments for number in segment.ids))
    return replace(episode.first, ids=ids, words=(-1,) * len(ids))


def context_of(episodes: Sequence[Episode], batch: PromptBatch, width: int, turn_decay: float) -> Context:
    """The words of prompts and segments, numbered through; an answer's own words are there for later turns only."""
    device, prompt = batch.ids.device, batch.ids.shape[1]
    words = torch.full((len(episodes), prompt + width), -1, dtype=torch.int64)
    words[:, :prompt] = batch.words.cpu()
    weights: list[list[float]] = []
    turns: list[list[int]] = []
    for row, episode in enumerate(episodes):
        own, since = list(episode.first.salience), [0] * len(episode.first.salience)
        place = prompt
        for segment in episode.segments:
            for word in segment.words:
                words[row, place] = -1 if word < 0 else len(own) + word
                place += 1
            place += len(segment.ids) - len(segment.words)
            own += segment.salience
            since += [segment.turn + segment.sampled] * len(segment.salience)
        weights.append(own)
        turns.append(since)
    most = max(map(len, weights))
    salience = torch.tensor([[*row, *[0.0] * (most - len(row))] for row in weights], dtype=torch.float32)
    since_turn = torch.tensor([[*row, *[0] * (most - len(row))] for row in turns], dtype=torch.int64)
    return Context(words.to(device), salience.to(device), since_turn.to(device), tuple(episodes), turn_decay)
