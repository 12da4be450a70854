"""The one scorer: teacher-forced passes over prompt + response that give log-probabilities, values and attention together.

Training, ``diagnose``, ``score``, ``rank``, ``view``, ``compare`` and the integrations all read answers through it. What is made
of the attention is a visitor's business, which is handed each micro-batch's while it is there.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cagsr.attention import PromptAttentionReader, Reading
from cagsr.attention.probe import looks_across
from cagsr.config import AttentionConfig, SamplingConfig
from cagsr.flow import EpisodeBatch, Readings
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.checkpointing import without_checkpointing
from cagsr.models.image_arguments import padded_places
from cagsr.models.inputs import PassInputs
from cagsr.models.layer_probe import LayerProbe, at_tokens
from cagsr.models.load import LoadedModel
from cagsr.models.sharing import shares_prompts
from cagsr.rollout.rows import episode_rows, take_rows
from cagsr.scoring.micro_batches import micro_batches
from cagsr.scoring.statistics import logprobs_and, readings_of
from cagsr.support.progress import each


class FrozenModel(Protocol):
    """A model of the policy's kind that is not trained: the starting model, mostly."""

    @property
    def module(self) -> nn.Module:
        """What an attention reader watches."""

    def model(self) -> AbstractContextManager[nn.Module]:
        """Gives the model for forward passes inside a ``with`` block."""


class Visitor(Protocol):
    """Is handed the attention of each micro-batch while it is there."""

    def visit(
        self, index: Tensor, part: EpisodeBatch, readings: Readings, attention: Tensor, regions: Tensor | None = None
    ) -> None:
        """Take in a micro-batch: the sequences ``index`` ``(n,)`` int64 of the batch, cut to their own length in ``part``.

        ``readings`` are the policy's, of them; ``attention`` is ``(n, response, context)`` float32, as wide as ``part``, and
        ``regions`` ``(n, response, regions)`` what of it, or of the cross-attention to images, goes to each region of the images;
        None: no image takes part.
        """


class Scorer:
    """Reads the policy's and the reference's view of finished answers, ``micro_batch_size`` at once.

    ``attention`` says which layers and heads are read, and whose (without a ``reference``, the frozen model, the policy's);
    ``sampling`` the temperature (0 counts as 1) and filters of the answers; ``actor_critic`` is the policy with what
    estimates values, None: the policy alone; ``probe`` reads hidden states, the reference's where there is one.
    ConfigError: layers or heads that can't be used, a probe of another model; AttentionError: attention that can't be read.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        attention: AttentionConfig,
        sampling: SamplingConfig,
        micro_batch_size: int,
        *,
        actor_critic: ActorCritic | None = None,
        reference: FrozenModel | None = None,
        probe: LayerProbe | None = None,
    ) -> None:
        if probe is not None:
            probe.check(loaded.model)
        self.probe = probe
        self.loaded = loaded
        self.sampling = sampling
        self.micro_batch_size = micro_batch_size
        self.actor_critic = actor_critic or ActorCritic(loaded)
        self.reference = reference
        self.reads_policy = attention.source == "policy" or reference is None
        watched = loaded.model if self.reads_policy or reference is None else reference.module
        self.reader = PromptAttentionReader(watched, layers=attention.layers, heads=attention.heads)
        self.image_reader: PromptAttentionReader | None = None
        if loaded.vision is not None and looks_across(watched):
            self.image_reader = PromptAttentionReader(
                watched, layers=attention.layers, heads=attention.heads, images=True
            )

    def read(self, episodes: EpisodeBatch, visitor: Visitor | None = None) -> tuple[Readings, Tensor]:
        """The policy's pass, then the reference's; the visitor gets the attention of the one that is configured.

        Gives the policy's readings and the reference's log-probabilities ``(batch, response)`` (without one the policy's
        own).
        """
        readings = self.policy(episodes, visitor)
        logprobs, support = self.frozen(episodes, readings, visitor)
        return replace(readings, support=support), logprobs

    def policy(self, episodes: EpisodeBatch, visitor: Visitor | None = None) -> Readings:
        """Read everything the reward and the update need from one pass over the policy; zero where nothing was sampled.

        The visitor gets the policy's attention, where it is the policy's that is configured.
        """
        visitor = visitor if self.reads_policy else None
        probe = self.probe if self.reference is None else None
        loaded = self.loaded
        statistics = readings_of(self.sampling, loaded.stops(self.sampling)[0], loaded.generation)
        names = [field.name for field in fields(Readings)]
        parts = {name: torch.zeros(episodes.ids.shape, device=episodes.ids.device) for name in names}
        with torch.no_grad(), loaded.autocast(), without_checkpointing(self.actor_critic):
            share = shares_prompts(loaded, episodes)
            for index in each("scoring", micro_batches(episodes, self.micro_batch_size, share=share), "batches"):
                part = episode_rows(episodes, index)
                inputs = PassInputs.of(part, share=share)
                with self._reading(visitor, loaded.model, inputs) as read, _asked(probe, loaded.model) as seen:
                    numbers, values = self.actor_critic(inputs, statistics, part.sampled)
                logprobs, entropy, certainty, correction = numbers.unbind(dim=-1)
                support = self._support(probe, loaded.model, inputs, seen)
                found = Readings(logprobs, entropy, certainty, correction, values, support)
                for name in names:
                    if (value := getattr(found, name)) is not None:
                        parts[name][index, : value.shape[1]] = value.masked_fill(~part.sampled, 0.0)
                if visitor is not None:
                    visitor.visit(index, part, found, *self._attention(loaded.model, inputs, read))
        if self.actor_critic.value_head is None:
            del parts["values"]
        if probe is None:
            del parts["support"]
        return Readings(**parts)

    def frozen(
        self, episodes: EpisodeBatch, readings: Readings, visitor: Visitor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the answers under the frozen model, ``(batch, response)`` float32, zero where nothing was sampled,
        and the probe's logits alike, None without a probe.

        ``readings`` are the policy's, for the visitor, which gets the frozen model's attention, where that is configured.
        """
        visitor = None if self.reads_policy else visitor
        loaded, temperature = self.loaded, self.sampling.temperature or 1.0
        if self.reference is None:
            return readings.logprobs, readings.support
        logprobs = torch.zeros(episodes.ids.shape, device=episodes.ids.device)
        support = None if self.probe is None else torch.zeros_like(logprobs)
        with (
            self.reference.model() as model,
            evaluating(model),
            torch.no_grad(),
            loaded.autocast(),
            without_checkpointing(loaded.model),
        ):
            share = shares_prompts(loaded, episodes)
            chunks = micro_batches(episodes, self.micro_batch_size, share=share)
            for index in each("scoring by the reference", chunks, "batches"):
                part = episode_rows(episodes, index)
                inputs = PassInputs.of(part, share=share)
                with self._reading(visitor, model, inputs) as read, _asked(self.probe, model) as seen:
                    found = loaded.token_statistics(inputs, logprobs_and(temperature=temperature), part.sampled, model)
                judged = self._support(self.probe, model, inputs, seen)
                if support is not None and judged is not None:
                    support[index, : part.ids.shape[1]] = judged.masked_fill(~part.sampled, 0.0)
                if visitor is not None:
                    own = take_rows(readings, index, part.ids.shape[1])
                    visitor.visit(index, part, own, *self._attention(model, inputs, read))
                logprobs[index, : part.ids.shape[1]] = found[..., 0]
        return logprobs, support

    def _support(
        self, probe: LayerProbe | None, model: nn.Module, inputs: PassInputs, seen: Sequence[Tensor]
    ) -> Tensor | None:
        """What the probe says of each of the answers' own tokens, ``(n, response)``."""
        return None if probe is None else at_tokens(self.loaded.architecture, model, inputs, seen)[..., 0]

    @contextmanager
    def _reading(
        self, visitor: Visitor | None, model: nn.Module, inputs: PassInputs
    ) -> Iterator[tuple[Sequence[Reading], Sequence[Reading]]]:
        """What listens to the forwards of one pass, and to their cross-attention to images; nothing without a visitor."""
        if visitor is None:
            yield (), ()
            return
        architecture = self.loaded.architecture
        with ExitStack() as stack:
            read = stack.enter_context(self.reader.read_in_turn(architecture.regions(model, inputs)))
            if self.image_reader is None or inputs.images is None:
                yield read, ()
                return
            across = architecture.image_regions(model, inputs)
            yield read, stack.enter_context(self.image_reader.read_in_turn(across))

    def _attention(
        self, model: nn.Module, inputs: PassInputs, read: tuple[Sequence[Reading], Sequence[Reading]]
    ) -> tuple[Tensor, Tensor | None]:
        architecture = self.loaded.architecture
        attention = architecture.attention(model, inputs, [one.attention for one in read[0]])
        if inputs.images is None:
            return attention, None
        if read[1]:
            across = architecture.attention(model, replace(inputs, looked_at=None), [one.attention for one in read[1]])
            return attention, across
        places, regions = padded_places(inputs.images, inputs.prompt_ids.shape[1])
        places = functional.pad(places, (0, attention.shape[2] - places.shape[1]), value=-1)[:, None, :]
        looked = attention.masked_fill(places < 0, 0.0)
        pooled = attention.new_zeros(*attention.shape[:2], regions)
        return attention, pooled.scatter_add(2, places.clamp(min=0).expand_as(looked), looked) if regions else pooled


def _asked(probe: LayerProbe | None, model: nn.Module) -> AbstractContextManager[Sequence[Tensor]]:
    """What a probe sees of the forwards of one pass; nothing without one."""
    return nullcontext(()) if probe is None else probe.listening(model)


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
