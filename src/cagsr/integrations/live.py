"""Score texts with a model that somebody else trains: their model object and token ids in, every reward term out.

What :class:`cagsr.evaluation.scorer.Scorer` does for a model of ours, with two things more: the model is left exactly as it
was, and the attention may come from a second, frozen model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cagsr.associate import read_associations
from cagsr.attention import PromptAttentionReader
from cagsr.config import AttentionConfig, RewardConfig, SalienceConfig
from cagsr.errors import ConfigError
from cagsr.evaluation.scorer import Response, Scorer
from cagsr.flow import EncodedPrompt, RewardBatch, Rollout, Trainer
from cagsr.models.load import LoadedModel
from cagsr.reward.build import check_reward_config
from cagsr.reward.keep import reward_batch
from cagsr.reward.terms import needs_associations
from cagsr.reward.values import term_values
from cagsr.update.score import score_policy, score_reference


@dataclass(frozen=True)
class FrozenModel:
    """The model whose attention is read when it isn't the policy's own."""

    module: nn.Module
    """What the attention reader watches."""
    model: Callable[[], AbstractContextManager[nn.Module]]
    """Gives the model for forward passes inside a ``with`` block."""


class LiveScorer:
    """Reads every term with a weight from a model that is trained by somebody else.

    Args:
        loaded: the policy, as it is now: its weights are read at each call.
        reward: terms, settings and weights.
        attention: which layers and heads, and with ``source`` whose: the policy's or that of ``reference``.
        salience: how the pieces of a word are pooled.
        temperature: divides the logits for self-certainty, as in sampling.
        micro_batch_size: answers in memory at once.
        reference: the frozen model, for ``attention.source`` ``reference``.

    Raises:
        ConfigError: a reward or a choice of layers that can't be used, or no reference where one is asked for.
        AttentionError: the model's attention can't be read.
        DataError: the associations' file can't be read.
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
        reference: FrozenModel | None = None,
    ) -> None:
        check_reward_config(reward)
        self.loaded = loaded
        path = reward.associations.path
        if path is None and needs_associations(reward):
            raise ConfigError(
                "associated_coverage and unsupported need associations, and no answers are sampled here to learn them from: "
                "give reward.associations.path the associations.json of a cagsr train run."
            )
        self.scorer = Scorer(
            loaded,
            reward,
            attention,
            salience,
            temperature=temperature,
            micro_batch_size=micro_batch_size,
            associations=None if path is None else read_associations(Path(path)),
        )
        self.weights = {name: weight for name, weight in self.scorer.weights.items() if weight != 0}
        self._terms = tuple(term for term in self.scorer.terms if term.name in self.weights)
        self._reference = reference if attention.source == "reference" else None
        self._reader: PromptAttentionReader | None = None
        if attention.source == "reference":
            if reference is None:
                raise ConfigError("attention.source is reference, but there is no reference model: use policy.")
            self._reader = PromptAttentionReader(reference.module, layers=attention.layers, heads=attention.heads)

    def terms(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response], trainer: Trainer | None = None
    ) -> dict[str, Tensor]:
        """Raw values of every term with a weight, name -> ``(answers,)`` float32 on the CPU.

        Without gradients, in evaluation mode; each module's training flag is as before afterwards. NaN where a term does
        not apply. ``trainer`` is what TRL's reward functions may ask; None: nothing is trained.

        Raises:
            DataError: an answer without a token.
            RewardError: a term fails or gives a number that is not finite.
        """
        size = self.scorer.micro_batch_size
        found: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        with evaluating(self.loaded.model), torch.no_grad():
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                batch = self.batch(self.scorer.rollout(prompts[part], responses[part]))
                batch = dataclasses.replace(batch, trainer=trainer)
                for term in self._terms:
                    found[term.name].append(term_values(term, batch).raw.cpu())
        return {name: torch.cat(values) if values else torch.zeros(0) for name, values in found.items()}

    def batch(self, rollout: Rollout) -> RewardBatch:
        """What the terms look at: one pass of the policy and, for the reference's attention, one of the reference."""
        if self._reference is None:
            return self.scorer.batch(rollout)
        size, sampling = self.scorer.micro_batch_size, self.scorer.sampling
        scores = score_policy(
            self.scorer.actor_critic, self.loaded, rollout, sampling, reader=None, micro_batch_size=size
        )
        with self._reference.model() as model, evaluating(model):
            logprobs, attention = score_reference(
                model, self.loaded, rollout, sampling.temperature, reader=self._reader, micro_batch_size=size
            )
        return reward_batch(rollout, scores, logprobs, attention, self.scorer.salience.pooling)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside the block and give every module its own training flag back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
