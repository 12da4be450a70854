"""What flows between the rooms: prompts -> episodes -> readings -> returns -> targets -> update.

Small frozen dataclasses with named tensors, in the order in which they come into being. Shape words used everywhere:
``batch`` sequences (prompts times candidates), ``prompt`` and ``response`` token positions after padding (the response is
all that follows the prompt), ``context`` positions that can be looked at (the prompt; of several turns prompt and response),
``words`` salient words of the context after padding. Masks are boolean. Token ids are int64, everything that is
computed is float32 whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Spoken(NamedTuple):
    """Where a chat message's content lies in a prompt's text."""

    start: int
    end: int
    role: str
    age: int
    """Exchanges since: 0 for the last user's message and the answer before it."""


@dataclass(frozen=True)
class Picture:
    """An image of a prompt, opened when it is needed."""

    source: Any
    """A file's path, an image file's bytes, or a PIL image."""
    name: str
    """What it is called in messages."""
    boxes: tuple[tuple[float, float, float, float], ...] | None = None
    """Its regions as the data gives them, (left, top, right, bottom) in pixels; None: it gives none."""


@dataclass(frozen=True)
class Sound:
    """A sound of a prompt, read when it is needed."""

    source: Any
    """A file's path, a sound file's bytes, or samples ``(time,)`` or ``(channels, time)`` with their rate in Hz, as a pair."""
    name: str
    """What it is called in messages."""
    spans: tuple[tuple[float, float], ...] | None = None
    """Its regions as the data gives them, (start, end) in seconds; None: it gives none."""


@dataclass(frozen=True)
class Region:
    """A part of an image, or of a sound's time, that an answer can look at.

    Its sides are shares of the image's width and height. Of a sound ``left`` and ``right`` are shares of its length, from ``top`` 0
    to ``bottom`` 1.
    """

    image: int
    """Which of the prompt's images, from 0; 0 of a sound."""
    left: float
    top: float
    right: float
    bottom: float
    weight: float
    """How much it matters, >= 0."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data, as text."""

    row: int
    """1-based position in its file, for messages."""
    text: str
    """What the model reads: the chat template applied, span markers removed."""
    template: tuple[tuple[int, int], ...] = ()
    """Character ranges of ``text`` that a chat template wrote (never salient)."""
    spans: tuple[tuple[int, int], ...] | None = None
    """Character ranges of ``text`` that the user calls important; None: the user named none."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The chat messages of a conversational prompt (role, content, and what else they hold), None for a plain one."""
    spoken: tuple[Spoken, ...] = ()
    """Where their contents lie in ``text``; without those that the template rewrote."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, handed to reward functions and metrics by name."""
    images: tuple[Picture, ...] = ()
    """Its images, in the order of their placeholders in ``text``, which stand there once each."""
    sounds: tuple[Sound, ...] = ()
    """Its sounds."""
    given: Any = None
    """The prompt as its row has it, where placeholders for images, or what opens a transcript, were put in; None: as ``text`` or
    ``messages`` say."""

    @property
    def asked(self) -> tuple[Any, ...]:
        """What makes two prompts the same: the text, and each image and sound (in memory one is the same as itself alone)."""
        media: tuple[Picture | Sound, ...] = (*self.images, *self.sounds)
        return (self.text, *(one.source if isinstance(one.source, str | bytes) else id(one.source) for one in media))


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as tokens, with the words the reward cares about."""

    prompt: Prompt
    ids: tuple[int, ...]
    """Token ids, special tokens included."""
    words: tuple[int, ...]
    """For each token the index of the salient word it is a piece of, -1 where it belongs to none."""
    salience: tuple[float, ...]
    """Weight of each salient word, > 0; their number is ``max(words) + 1``."""
    regions: tuple[Region, ...] = ()
    """The regions of its images, or of its sound."""
    places: tuple[int, ...] = ()
    """The region of each place at which the model holds a piece of an image or a sound, -1 for none: of each token of the prompt,
    or, where the model looks at them by cross-attention, of each state of them. Empty: neither."""


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """The images, or the sound, of one prompt as a model takes them: made once, and the same object in all rows that answer the
    prompt.
    """

    tensors: Mapping[str, Tensor]
    """By the names of the model's forward, as its processor makes them of this prompt alone."""
    by_row: bool
    """Their first dimension counts prompts (of length 1 here); False: images, or patches of them."""
    token_id: int
    """The token that stands where an image is read; -1: none does, as for a sound."""
    places: Tensor
    """(places,) int64, as ``EncodedPrompt.places``."""
    weights: Tensor
    """(regions,) float32: the weight of each region."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded into tensors: on the left for decoder-only models, on the right for encoder-decoder models."""

    prompts: tuple[Prompt, ...]
    ids: Tensor
    """(batch, prompt) int64."""
    real: Tensor
    """(batch, prompt) bool: no padding."""
    words: Tensor
    """(batch, prompt) int64, -1: padding, template, sink or unimportant."""
    salience: Tensor
    """(batch, words) float32, 0 on padding."""
    group: Tensor
    """(batch,) int64: sequences with the same number answer the same prompt."""
    images: tuple[ImageInputs | None, ...] | None = None
    """Of each sequence, shared by those that answer the same prompt; None: no prompt of the batch has images or a sound."""


@dataclass(frozen=True)
class Segment:
    """One stretch of an episode: what the model said, or what a task replied."""

    ids: tuple[int, ...]
    text: str
    role: str
    """Who speaks, as in chat messages: assistant for the model's own."""
    turn: int
    """The exchange that it belongs to, from 0: what is asked, and the answer to it."""
    sampled: bool
    """The model said it, so it carries loss and reward; False: it was read."""
    words: tuple[int, ...] = ()
    """For each token the index of the salient word *of this segment* it is a piece of, -1 for none."""
    salience: tuple[float, ...] = ()
    """Weight of each of its salient words, > 0."""


@dataclass(frozen=True)
class Episode:
    """What a task and a policy made together: the prompt, and the segments that followed it."""

    first: EncodedPrompt
    segments: tuple[Segment, ...]
    ended: bool
    """The last answer stopped by itself; False: it was cut at the length limit."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that the model said, turn by turn."""
        return tuple(segment.text for segment in self.segments if segment.sampled)


@dataclass(frozen=True)
class Context:
    """What the positions of episodes of several turns may look at: every salient word that stands before them."""

    words: Tensor
    """(batch, prompt + response) int64, the salient word of each position, -1: none."""
    salience: Tensor
    """(batch, words) float32, 0 on padding."""
    word_turn: Tensor
    """(batch, words) int64: the first turn whose answer may look at it."""
    episodes: tuple[Episode, ...]
    turn_decay: float = 1.0
    """What a word's weight is multiplied with for each turn since (``salience.turn_decay``)."""
    said: Tensor | None = None
    """(batch, response) bool: all that the model has said, where each answer is a row of its own; None: that is ``sampled``."""


@dataclass(frozen=True)
class EpisodeBatch:
    """Episodes as tensors: the prompts, which the answers of a group share, and what followed them.

    The prompts stand apart, because they are padded on their own side and read once a group: they are the prefix of a
    decoder-only model's sequence, and the source of an encoder-decoder's.
    """

    prompts: PromptBatch
    ids: Tensor
    """(batch, response) int64, what followed the prompt, padded on the right."""
    real: Tensor
    """(batch, response) bool: no padding."""
    sampled: Tensor
    """(batch, response) bool: said by the policy, stop tokens included; never more than ``real``."""
    turn: Tensor
    """(batch, response) int64: the exchange of each position, from 0."""
    ended: Tensor
    """(batch,) bool: the last answer stopped by itself (not cut at the length limit)."""
    completions: tuple[str, ...]
    """The last answers as text, special tokens removed."""
    sampler_logprobs: Tensor | None = None
    """(batch, response) under the distribution an engine drew from, as it says."""
    decoded_logprobs: Tensor | None = None
    """(batch, response) the same of our own decoding; None: greedy, or an engine."""
    context: Context | None = None
    """None: one turn, and the context is the prompt."""
    given: Tensor | None = None
    """(batch,) bool: the answer is the row's reference, which stands among the sampled ones as if it were one; None: none is."""

    @classmethod
    def of_one_turn(
        cls,
        prompts: PromptBatch,
        ids: Tensor,
        mask: Tensor,
        ended: Tensor,
        completions: tuple[str, ...],
        decoded_logprobs: Tensor | None = None,
    ) -> EpisodeBatch:
        """One answer to each prompt: all that is real was sampled, in turn 0.

        Args:
            prompts: ``(batch, prompt)``.
            ids: ``(batch, response)`` int64, padded on the right.
            mask: ``(batch, response)`` bool, true up to and including the stop token.
            ended: ``(batch,)`` bool.
            completions: the answers as text.
            decoded_logprobs: see the field.
        """
        return cls(
            prompts, ids, mask, mask, torch.zeros_like(ids), ended, completions, decoded_logprobs=decoded_logprobs
        )

    @property
    def words(self) -> Tensor:
        """``(batch, context)`` int64: the salient word of each position that can be looked at, -1 for none."""
        return self.prompts.words if self.context is None else self.context.words

    @property
    def salience(self) -> Tensor:
        """``(batch, words)`` float32: the weight of each salient word, 0 on padding."""
        return self.prompts.salience if self.context is None else self.context.salience

    @property
    def context_ids(self) -> Tensor:
        """``(batch, context)`` int64: the tokens that can be looked at."""
        return self.prompts.ids if self.context is None else torch.cat([self.prompts.ids, self.ids], dim=1)

    @property
    def lengths(self) -> Tensor:
        """``(batch,)`` int64: sampled tokens, all turns together."""
        return self.sampled.sum(dim=1)


@dataclass(frozen=True)
class Attention:
    """What was read of the attention from response positions to the context, averaged over layers and heads."""

    maps: Tensor
    """(batch, response, context)."""
    words: Tensor
    """(batch, response, words) the same, pieces of a word pooled."""
    regions: Tensor | None = None
    """(batch, response, regions) the same of the regions of images or sounds, whose pieces are added up; None: there are none."""


@dataclass(frozen=True)
class Readings:
    """What one teacher-forced pass over prompt + response reads, at the sampling temperature; 0 where nothing was sampled."""

    logprobs: Tensor
    """(batch, response) log-probability of each sampled token under the policy."""
    entropy: Tensor
    """(batch, response) entropy of each next-token distribution, nats."""
    certainty: Tensor
    """(batch, response) KL(uniform || policy), nats (self-certainty, arXiv 2505.19590)."""
    sampling_correction: Tensor
    """(batch, response) log policy - log sampler, 0 where both are the same distribution."""
    values: Tensor | None = None
    """(batch, response) value estimates before each response token."""
    support: Tensor | None = None
    """(batch, response) the grounding probe's logit that the prompt holds what a token says; None: no probe was asked."""


class Trainer(Protocol):
    """Who calls a reward function, as TRL's functions ask for it."""

    def arguments(self, function: str, answers: int) -> dict[str, Any]:
        """``trainer_state``, ``log_metric`` and ``log_extra`` for a call of ``function`` that judges so many answers."""
        ...


@dataclass(frozen=True)
class RewardBatch:
    """All that a reward term may look at, one answer a row; of episodes of several turns each answer is a row of its own."""

    episodes: EpisodeBatch
    readings: Readings
    reference_logprobs: Tensor | None
    """(batch, response) under the frozen starting model; None: not read (yet)."""
    attention: Attention | None = None
    """From the policy or the reference, as configured; None: not read."""
    trainer: Trainer | None = None
    """None: nothing is trained."""


@dataclass(frozen=True)
class Returns:
    """The weighted sum of the reward terms, with what each of them gave."""

    total: Tensor
    """(batch,) sum of ``contributions``."""
    per_token: Tensor
    """(batch, response) the same, on the tokens it is paid at; rows sum to ``total``."""
    by_turn: Tensor
    """(batch, turns) the same, by the answer it was paid for; 0 where there is no such turn."""
    terms: Mapping[
        str, Tensor
    ]  # name -> (batch,) raw value of the term, of several turns the mean; NaN: does not apply
    contributions: Mapping[str, Tensor]
    """Name -> (batch,) weight * normalised value, of several turns the sum."""


@dataclass(frozen=True)
class Targets:
    """What each position is trained towards."""

    advantages: Tensor
    """(batch, response)."""
    returns: Tensor
    """(batch, response) regression target of the value head; zeros for value-free estimators."""
    weights: Mapping[str, Tensor]
    """Objective -> (batch, response) float32, how strongly each position takes part in it: ``rl`` (policy, value, entropy
    and KL: the sampled positions) and ``ce`` (imitation: none, unless somebody marks some)."""


@dataclass(frozen=True)
class Experience:
    """One batch ready for the update: everything that was fixed before the first gradient step."""

    episodes: EpisodeBatch
    readings: Readings
    reference_logprobs: Tensor
    """(batch, response)."""
    returns: Returns
    targets: Targets
    sampler_metrics: Mapping[str, float] = field(default_factory=dict)
    """How far decoding, an engine and the plain pass are from the scoring pass."""
