"""What flows between the rooms: prompts -> rollout -> scores -> reward -> advantage -> update.

Small frozen dataclasses with named tensors, in the order in which they come into being. Shape words used everywhere:
``batch`` sequences (prompts times candidates), ``prompt`` and ``response`` token positions after padding, ``words``
salient words of a prompt after padding. Masks are boolean, True for real tokens. Token ids are int64, everything that
is computed is float32 whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


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
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, handed to reward functions and metrics by name."""


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


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded into tensors: on the left for decoder-only models, on the right for encoder-decoder models."""

    prompts: tuple[Prompt, ...]
    ids: Tensor  # (batch, prompt) int64
    mask: Tensor  # (batch, prompt) bool
    words: Tensor  # (batch, prompt) int64, -1: padding, template, sink or unimportant
    salience: Tensor  # (batch, words) float32, 0 on padding
    group: Tensor  # (batch,) int64: sequences with the same number answer the same prompt


@dataclass(frozen=True)
class Rollout:
    """Sampled answers to a batch of prompts, cut at the first stop token."""

    prompts: PromptBatch
    response_ids: Tensor  # (batch, response) int64, padded on the right
    response_mask: Tensor  # (batch, response) bool, True up to and including the stop token
    ended: Tensor  # (batch,) bool: the answer stopped by itself (not cut at the length limit)
    completions: tuple[str, ...]  # the answers as text, special tokens removed
    sampler_logprobs: Tensor | None = None  # (batch, response) under the distribution an engine drew from, as it says
    decoded_logprobs: Tensor | None = None  # (batch, response) the same of our own decoding; None: greedy, or an engine


@dataclass(frozen=True)
class PromptAttention:
    """What a scoring pass kept of the prompt attention, averaged over layers and heads."""

    maps: Tensor | None  # (batch, response, prompt); None: only the values below were kept
    values: Mapping[str, Tensor] = field(default_factory=dict)  # reward term -> (batch,), or dense (batch, response)


@dataclass(frozen=True)
class Scores:
    """What one teacher-forced pass over prompt + response reads, at the sampling temperature."""

    logprobs: Tensor  # (batch, response) log-probability of each sampled token under the scored policy
    entropy: Tensor  # (batch, response) entropy of each next-token distribution, nats
    certainty: Tensor  # (batch, response) KL(uniform || policy), nats (self-certainty, arXiv 2505.19590)
    sampling_correction: Tensor  # (batch, response) log policy - log sampler, 0 where both are the same distribution
    values: Tensor | None = None  # (batch, response) value estimates before each response token
    attention: PromptAttention | None = None  # the scored policy's; None: not read


class Trainer(Protocol):
    """Who calls a reward function, as TRL's functions ask for it."""

    def arguments(self, function: str, answers: int) -> dict[str, Any]:
        """``trainer_state``, ``log_metric`` and ``log_extra`` for a call of ``function`` that judges so many answers."""
        ...


@dataclass(frozen=True)
class RewardBatch:
    """All that a reward term may look at."""

    rollout: Rollout
    scores: Scores
    reference_logprobs: Tensor | None  # (batch, response) under the frozen starting model
    attention: Tensor | None  # (batch, response, prompt) from the policy or the reference, as configured
    word_attention: Tensor | None  # (batch, response, words) the same, pieces of a word pooled
    read: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # terms worked out while the attention was read, no map kept
    trainer: Trainer | None = None  # None: nothing is trained


@dataclass(frozen=True)
class Reward:
    """The weighted sum of the reward terms, with what each of them gave."""

    total: Tensor  # (batch,) sum of ``contributions``
    per_token: Tensor  # (batch, response) the same, on the tokens it is paid at; rows sum to ``total``
    terms: Mapping[str, Tensor]  # name -> (batch,) raw value of the term
    contributions: Mapping[str, Tensor]  # name -> (batch,) weight * normalised value


@dataclass(frozen=True)
class Advantages:
    """What the policy and the value head are trained on."""

    advantages: Tensor  # (batch, response)
    returns: Tensor  # (batch, response) regression target of the value head; zeros for value-free estimators


@dataclass(frozen=True)
class Experience:
    """One batch ready for the update: everything that was fixed before the first gradient step."""

    rollout: Rollout
    scores: Scores
    reference_logprobs: Tensor  # (batch, response)
    reward: Reward
    advantages: Advantages
    sampler_metrics: Mapping[str, float] = field(
        default_factory=dict
    )  # how far decoding, an engine and the plain pass are from it
