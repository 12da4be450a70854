"""The teacher-forced pass over prompt + response that gives log-probabilities, values and prompt attention together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cagsr.attention import PromptAttentionReader
from cagsr.config import SamplingConfig
from cagsr.flow import PromptAttention, Rollout, Scores
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.checkpointing import without_checkpointing
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.sharing import shares_prompts
from cagsr.reward.keep import AttentionKeeper
from cagsr.reward.terms import AttentionTerm
from cagsr.rollout.rows import rollout_rows
from cagsr.support.progress import each
from cagsr.update.reading import attention_of, reading
from cagsr.update.statistics import logprobs_entropy_and_certainty, sampling_correction, token_logprobs


def length_sorted_chunks(
    rollout: Rollout, size: int, index: Tensor | None = None, *, share: bool = False
) -> list[Tensor]:
    """Split sequences into micro-batches of similar length, so that little of the work is padding.

    Args:
        rollout: prompts and answers.
        size: sequences per micro-batch.
        index: which sequences, ``(n,)`` int64; None: all.
        share: a prompt is fed once for all its answers in a micro-batch: of two orders, by the length of the answer and
            by prompt, take the one that feeds fewer positions.

    Returns:
        Index tensors of at most ``size`` sequences, which together are ``index``.
    """
    if index is None:
        index = torch.arange(rollout.response_ids.shape[0], device=rollout.response_ids.device)
    prompts, responses = rollout.prompts.mask.sum(dim=1)[index], rollout.response_mask.sum(dim=1)[index]
    if not share:
        return list(index[torch.argsort(prompts + responses, stable=True)].split(size))
    group = rollout.prompts.group[index]
    _, of_row = torch.unique(group, return_inverse=True)
    longest = torch.zeros_like(responses).scatter_reduce(0, of_row, responses, "amax")[of_row]
    by_prompt = torch.argsort((longest + prompts) * (len(group) + 1) + of_row, stable=True)
    orders = [torch.argsort(responses, stable=True), by_prompt]
    return [
        index[part]
        for part in min(
            (order.split(size) for order in orders), key=lambda parts: _fed(parts, prompts, responses, group)
        )
    ]


def _fed(parts: Sequence[Tensor], prompts: Tensor, responses: Tensor, group: Tensor) -> int:
    """Positions that these micro-batches feed to the model, padding included, each prompt once."""
    return sum(
        len(group[part].unique()) * int(prompts[part].max()) + len(part) * int(responses[part].max()) for part in parts
    )


def score_policy(
    actor_critic: ActorCritic,
    loaded: LoadedModel,
    rollout: Rollout,
    sampling: SamplingConfig,
    *,
    reader: PromptAttentionReader | None,
    micro_batch_size: int,
    terms: Sequence[AttentionTerm] | None = None,
    pooling: Literal["sum", "max"] = "sum",
) -> Scores:
    """Read everything the reward and the update need from one pass over the policy.

    Args:
        actor_critic: the policy with its value head, unwrapped.
        loaded: device, precision, stop tokens.
        rollout: prompts and sampled answers.
        sampling: how they were sampled.
        reader: reads the prompt attention in the same pass; None: not read here.
        micro_batch_size: sequences in memory at once.
        terms: what to make of each micro-batch's attention, whose maps are then dropped; None: keep the maps.
        pooling: how the pieces of a word are put together for them.

    Returns:
        Scores, ``(batch, response)`` each, zero on padding; of the attention the maps or the terms' values.
    """
    shape = rollout.response_ids.shape
    zeros = torch.zeros(shape, device=rollout.response_ids.device)
    parts = {name: zeros.clone() for name in ("logprobs", "entropy", "certainty", "correction", "values")}
    keeper = None if reader is None else AttentionKeeper(rollout, terms, pooling)
    temperature = sampling.temperature or 1.0
    with torch.no_grad(), loaded.autocast(), without_checkpointing(actor_critic):
        share = shares_prompts(loaded, rollout)
        for index in each("scoring", length_sorted_chunks(rollout, micro_batch_size, share=share), "batches"):
            part = rollout_rows(rollout, index)
            inputs = PassInputs.of(part, share=share)
            with reading(reader, loaded.architecture, loaded.model, inputs) as read:
                logits, values = actor_critic(inputs)
            if keeper is not None and read is not None:
                keeper.add(index, part, attention_of(read, loaded.architecture, loaded.model, inputs))
            ids, mask = inputs.response_ids, inputs.response_mask
            logprobs, entropy, certainty = logprobs_entropy_and_certainty(logits, ids, temperature)
            found = {
                "logprobs": logprobs,
                "entropy": entropy,
                "certainty": certainty,
                "correction": sampling_correction(logits, ids, sampling, loaded.stops(sampling)[0], loaded.generation),
            }
            if values is not None:
                found["values"] = values
            for name, value in found.items():
                parts[name][index, : mask.shape[1]] = value.masked_fill(~mask, 0.0)
    return Scores(
        logprobs=parts["logprobs"],
        entropy=parts["entropy"],
        certainty=parts["certainty"],
        sampling_correction=parts["correction"],
        values=parts["values"] if actor_critic.value_head is not None else None,
        attention=None if keeper is None else keeper.kept,
    )


def score_reference(
    model: nn.Module,
    loaded: LoadedModel,
    rollout: Rollout,
    temperature: float,
    *,
    reader: PromptAttentionReader | None,
    micro_batch_size: int,
    terms: Sequence[AttentionTerm] | None = None,
    pooling: Literal["sum", "max"] = "sum",
) -> tuple[Tensor, PromptAttention | None]:
    """Log-probabilities (and prompt attention) of the answers under the frozen starting model.

    Args:
        model: the reference's module, its adapter off.
        loaded: device and precision.
        rollout: prompts and sampled answers.
        temperature: the sampling temperature.
        reader: reads the reference's prompt attention; None: not read here.
        micro_batch_size: sequences in memory at once.
        terms: what to make of each micro-batch's attention, whose maps are then dropped; None: keep the maps.
        pooling: how the pieces of a word are put together for them.

    Returns:
        ``(batch, response)`` float32, zero on padding, and what was kept of the attention, None if it was not read.
    """
    logprobs = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
    keeper = None if reader is None else AttentionKeeper(rollout, terms, pooling)
    with torch.no_grad(), loaded.autocast(), without_checkpointing(loaded.model):
        share = shares_prompts(loaded, rollout)
        chunks = length_sorted_chunks(rollout, micro_batch_size, share=share)
        for index in each("scoring by the reference", chunks, "batches"):
            part = rollout_rows(rollout, index)
            inputs = PassInputs.of(part, share=share)
            with reading(reader, loaded.architecture, model, inputs) as read:
                logits, _ = loaded.teacher_forced(inputs, model)
            if keeper is not None and read is not None:
                keeper.add(index, part, attention_of(read, loaded.architecture, model, inputs))
            found = token_logprobs(logits, inputs.response_ids, temperature)
            logprobs[index, : found.shape[1]] = found.masked_fill(~inputs.response_mask, 0.0)
    return logprobs, None if keeper is None else keeper.kept
