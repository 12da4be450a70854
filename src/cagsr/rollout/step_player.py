"""Answers cut into their steps: each step is judged as an answer of its own, by the question and the steps before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cagsr.errors import ConfigError
from cagsr.flow import EncodedPrompt, Episode, EpisodeBatch, PromptBatch, Segment
from cagsr.models.load import LoadedModel
from cagsr.rollout.episodes import Sample, context_of
from cagsr.tasks.segments import SegmentEncoder
from cagsr.tasks.steps import Split


@dataclass(frozen=True)
class StepPlayer:
    """Samples one answer to each prompt, and takes its steps for the turns of an episode."""

    loaded: LoadedModel
    split: Split
    encoder: SegmentEncoder

    def __post_init__(self) -> None:
        if not self.loaded.architecture.one_sequence:
            raise ConfigError(
                f"--steps.by: {self.loaded.path} is an encoder-decoder model, in which no step looks at the steps before by its "
                "cross-attention; chains of thought need a decoder-only model."
            )

    def __call__(self, sample: Sample, prompts: Sequence[EncodedPrompt], batch: PromptBatch) -> EpisodeBatch:
        """Sample with the engine ``sample``; the tokens are as it gives them, their turns are the steps'."""
        found = sample(batch)
        turn = torch.zeros_like(found.ids)
        episodes = []
        for row, prompt in enumerate(prompts):
            segments = self.steps(found.ids[row][found.real[row]].tolist(), found.completions[row])
            start = 0
            for segment in segments:
                turn[row, start : start + len(segment.ids)] = segment.turn
                start += len(segment.ids)
            episodes.append(Episode(prompt, tuple(segments), bool(found.ended[row])))
        if all(len(episode.segments) <= 1 for episode in episodes):
            return found
        context = context_of(episodes, batch, found.ids.shape[1], self.encoder.salience.turn_decay)
        return replace(found, turn=turn, context=context)

    def steps(self, ids: Sequence[int], text: str) -> list[Segment]:
        """Cut an answer into its steps: its tokens, and its text, which says nothing of a stop string that ended it.

        A token that two steps share belongs to the first, which says all of it; no step is without a token.
        """
        _, offsets = self.loaded.spans(ids)
        ends = self.split(text)
        cuts: list[tuple[int, int]] = []  # tokens and characters up to the end of each step
        for end in ends[:-1]:
            stop = next((place for place, (first, _) in enumerate(offsets) if first >= end), len(ids))
            if (cuts[-1][0] if cuts else 0) < stop < len(ids):
                cuts.append((stop, end))
        cuts.append((len(ids), len(text)))
        segments, start, said = [], 0, 0
        for number, (stop, end) in enumerate(cuts):
            segments.append(self.encoder.answer(ids[start:stop], text[said:end], number))
            start, said = stop, end
        return segments
