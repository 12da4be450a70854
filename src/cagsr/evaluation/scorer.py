"""Score finished answers outside a training run: texts or samples in, every reward term out.

The same scoring pass, the same terms and the same salience as in training, but for a file instead of a step: terms
are read micro-batch by micro-batch, and normalised once all of them are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.attention import PromptAttentionReader
from cagsr.config import AttentionConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, RewardBatch, Rollout
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.continuation import encode_continuation
from cagsr.models.load import LoadedModel
from cagsr.models.stops import turn_end
from cagsr.reward.association import Associations
from cagsr.reward.build import build_reward
from cagsr.reward.keep import reward_batch
from cagsr.reward.protocol import RewardTerm
from cagsr.reward.terms import ASSOCIATION_TERMS, builtin_terms, needs_associations
from cagsr.reward.values import term_values
from cagsr.rollout.rows import prompt_batch
from cagsr.update.score import score_policy


@dataclass(frozen=True)
class Response:
    """A finished answer."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, the stop token included if it ended by itself."""
    ended: bool
    """It stopped by itself; False: it was cut."""


def encode_response(
    loaded: LoadedModel,
    prompt: EncodedPrompt,
    text: str,
    *,
    ended: bool = True,
    limit: int | None = None,
    ids: Sequence[int] | None = None,
) -> Response:
    """Turn an answer's text into the tokens the model would have had to say.

    They are those that ``sft`` and ``dpo`` train on (``models/continuation.py``): what can be written behind the prompt's
    own. The answer of an encoder-decoder is a text of its own. No special tokens are put in but the one that ends an
    answer: EOS, in a conversation the one that the chat template writes behind the assistant's turn.

    Args:
        loaded: the model's tokenizer and stop tokens.
        prompt: what is answered.
        text: the answer.
        ended: the answer is complete; False appends no stop token.
        limit: cut the answer to this many tokens (it is then unfinished); None: never.
        ids: the tokens it was sampled as, taken as they are; None: tokenise the text.

    Returns:
        The answer; its ``ids`` are empty for a text without a token that is cut.
    """
    tokens = _tokens(loaded, prompt, text, ended) if ids is None else [int(token) for token in ids]
    if limit is not None and len(tokens) > limit:
        tokens, ended = tokens[:limit], False
    return Response(text, tuple(tokens), ended)


def stop_token(loaded: LoadedModel, prompt: EncodedPrompt) -> int:
    """The token with which the model ends an answer to this prompt."""
    end = None if prompt.prompt.messages is None else turn_end(loaded.tokenizer)
    if end is not None and end.stop is not None:
        return end.stop
    eos = loaded.tokenizer.eos_token_id
    return loaded.stop_ids[0] if eos is None else int(eos)


def _tokens(loaded: LoadedModel, prompt: EncodedPrompt, text: str, ended: bool) -> list[int]:
    messages = prompt.prompt.messages
    end = None if messages is None else turn_end(loaded.tokenizer)
    said = text
    if end is not None and messages is not None and text:
        if messages[-1]["role"] != "assistant" and not text.startswith(end.lead):
            said = end.lead + said
        if ended and not text.endswith((end.gap, end.marker)):
            said += end.gap
    ids = encode_continuation(loaded.tokenizer, loaded.architecture.text_before(prompt.prompt.text), said)
    stop = stop_token(loaded, prompt)
    # The end may be written in the text itself (or the tokenizer closes every text with it).
    while ids and ids[-1] in loaded.stop_ids:
        stop = ids.pop()
    return [*ids, stop] if text and ids and ended else ids


class Scorer:
    """Reads everything the reward looks at from one pass over prompt + answer, and asks every term.

    Args:
        loaded: the model whose attention is read.
        reward: terms, their settings and weights; every built-in term is computed, also those of weight 0.
        attention: which layers and heads (``source`` makes no difference: the only model here is the starting model).
        salience: how the pieces of a word are pooled.
        temperature: divides the logits for log-probabilities and self-certainty, as in sampling.
        micro_batch_size: answers in memory at once.
        associations: what the association terms read; without them these terms are left out, whatever their weights.

    Raises:
        ConfigError: a reward (without associations: what is left of it) or a choice of layers that can't be used.
        AttentionError: the model's attention can't be read.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        reward: RewardConfig,
        attention: AttentionConfig,
        salience: SalienceConfig,
        *,
        temperature: float = 1.0,
        micro_batch_size: int = 32,
        associations: Associations | None = None,
    ) -> None:
        self.loaded = loaded
        self.config = reward
        self.salience = salience
        self.sampling = SamplingConfig(temperature=temperature or 1.0)
        self.micro_batch_size = micro_batch_size
        self.actor_critic = ActorCritic(loaded)
        self.reader = PromptAttentionReader(loaded.model, layers=attention.layers, heads=attention.heads)
        if associations is None and needs_associations(reward):
            none = {name: dataclasses.replace(getattr(reward, name), weight=0.0) for name in ASSOCIATION_TERMS}
            reward = dataclasses.replace(reward, **none)
        chosen = build_reward(reward, device=loaded.device, associations=associations, texts=loaded.texts)
        builtin = {term.name: (term, weight) for term, weight in builtin_terms(reward, associations, loaded.texts)}
        others = [
            (term, weight)
            for term, weight in zip(chosen.terms, chosen.weights, strict=True)
            if term.name not in builtin
        ]
        both = [*builtin.values(), *others]
        self.terms: tuple[RewardTerm, ...] = tuple(term for term, _ in both)
        self.weights: dict[str, float] = {term.name: float(weight) for term, weight in both}

    def rollout(self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response]) -> Rollout:
        """Pad prompts and finished answers, one answer for each prompt, into a rollout.

        Raises:
            DataError: an answer without a token; the message names the prompt's row.
        """
        for prompt, response in zip(prompts, responses, strict=True):
            if not response.ids:
                raise DataError(
                    f"Row {prompt.prompt.row}: a response of zero tokens can't be scored; remove the row or mend it."
                )
        batch = prompt_batch(self.loaded, prompts)
        width = max(len(response.ids) for response in responses)
        ids = torch.full((len(responses), width), self.loaded.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(responses), width), dtype=torch.bool)
        for row, response in enumerate(responses):
            ids[row, : len(response.ids)] = torch.tensor(response.ids, dtype=torch.int64)
            mask[row, : len(response.ids)] = True
        device = self.loaded.device
        ended = torch.tensor([response.ended for response in responses], dtype=torch.bool)
        texts = tuple(response.text for response in responses)
        return Rollout(batch, ids.to(device), mask.to(device), ended.to(device), texts)

    def batch(self, rollout: Rollout) -> RewardBatch:
        """Score a rollout: log-probabilities, entropies, self-certainty and prompt attention in one pass.

        The model is its own reference here, so ``reference_logprobs`` are its own.
        """
        scores = score_policy(
            self.actor_critic,
            self.loaded,
            rollout,
            self.sampling,
            reader=self.reader,
            micro_batch_size=self.micro_batch_size,
        )
        return reward_batch(rollout, scores, scores.logprobs, scores.attention, self.salience.pooling)

    def values(self, batch: RewardBatch) -> dict[str, Tensor]:
        """Give every term's raw values, name -> ``(batch,)`` float32 on the CPU, NaN where a term does not apply.

        Raises:
            RewardError: a term fails or gives a number that is not finite.
        """
        return {term.name: term_values(term, batch).raw.cpu() for term in self.terms}

    def score_texts(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response]
    ) -> Iterator[tuple[RewardBatch, dict[str, Tensor]]]:
        """Score answers in their order, ``micro_batch_size`` at a time: what the terms saw and what they gave."""
        for start in range(0, len(prompts), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            batch = self.batch(self.rollout(prompts[part], responses[part]))
            yield batch, self.values(batch)
