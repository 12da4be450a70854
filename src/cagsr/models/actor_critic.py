"""The policy and, for GAE, its value estimates in one module: one teacher-forced pass gives both.

The module is what accelerate wraps, so that every parameter is used through one ``forward``.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cagsr.config import PPOConfig
from cagsr.errors import ModelError
from cagsr.flow import Rollout
from cagsr.models.load import LoadedModel


@dataclass(frozen=True)
class PassInputs:
    """A batch of prompts and answers, as the model's forward takes them."""

    prompt_ids: Tensor  # (batch, prompt)
    prompt_mask: Tensor  # (batch, prompt)
    response_ids: Tensor  # (batch, response)
    response_mask: Tensor  # (batch, response)

    @classmethod
    def of(cls, rollout: Rollout) -> PassInputs:
        """Take the tensors of a rollout."""
        return cls(rollout.prompts.ids, rollout.prompts.mask, rollout.response_ids, rollout.response_mask)

    @classmethod
    def tiny(cls, device: torch.device) -> PassInputs:
        """Make the smallest batch any model takes."""
        ids = torch.ones(1, 2, dtype=torch.long, device=device)
        return cls(ids, ids.bool(), ids, ids.bool())

    def rows(self, index: Tensor) -> PassInputs:
        """Select sequences, cut to the longest prompt and response among them (no padding waste).

        Prompts padded on the left lose columns on the left, prompts padded on the right lose them on the right.
        """
        prompt_mask, response_mask = self.prompt_mask[index], self.response_mask[index]
        columns = prompt_mask.any(dim=0).nonzero().flatten()
        first, last = int(columns[0]), int(columns[-1]) + 1
        length = max(1, int(response_mask.sum(dim=1).max()))
        return PassInputs(
            self.prompt_ids[index, first:last],
            prompt_mask[:, first:last],
            self.response_ids[index, :length],
            response_mask[:, :length],
        )


class ActorCritic(nn.Module):
    """A policy with an optional value head or critic.

    Args:
        loaded: the policy.
        pad_token_id: fills the positions that no mask lets through.
        value: ``none`` (value-free estimators), ``head`` (linear, on the policy's last hidden state) or ``model``
            (a copy of the policy's weights with a head of its own).
    """

    def __init__(self, loaded: LoadedModel, value: str = "none") -> None:
        super().__init__()
        self.policy = loaded.model
        self.encoder_decoder = loaded.encoder_decoder
        self.pad_token_id = loaded.pad_token_id
        self.critic: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        if value != "none":
            if value == "model":
                if loaded.lora:
                    raise ModelError("--ppo.critic model needs full fine-tuning; with LoRA use --ppo.critic head.")
                self.critic = copy.deepcopy(loaded.model)
                head, embedding = self.critic.get_output_embeddings(), self.critic.get_input_embeddings()
                if head.weight is not embedding.weight:
                    head.requires_grad_(False)  # only its input is used; DDP waits for every trainable parameter
            width = loaded.model.get_output_embeddings().weight.shape[-1]
            # Zero weights: every value is 0 before the first update, so the first advantages are plain returns.
            self.value_head = nn.Linear(width, 1).to(loaded.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @classmethod
    def build(cls, loaded: LoadedModel, config: PPOConfig) -> ActorCritic:
        """The module that ``config.estimator`` and ``config.critic`` ask for."""
        return cls(loaded, value=config.critic if config.estimator == "gae" else "none")

    def forward(self, inputs: PassInputs) -> tuple[Tensor, Tensor | None]:
        """Run prompt + response through the model with the sampled tokens as input (teacher forcing).

        Args:
            inputs: ids and masks, ``(batch, prompt)`` and ``(batch, response)``.

        Returns:
            Logits ``(batch, response, vocabulary)`` at the positions that predict each response token, and the values
            ``(batch, response)`` float32 at the same positions, None without a value head.
        """
        if self.value_head is None:
            logits, _ = teacher_forced(self.policy, inputs, self.encoder_decoder, self.pad_token_id)
            return logits, None
        logits, hidden = teacher_forced(self.policy, inputs, self.encoder_decoder, self.pad_token_id, with_hidden=True)
        if self.critic is not None:
            _, hidden = teacher_forced(self.critic, inputs, self.encoder_decoder, self.pad_token_id, with_hidden=True)
        assert hidden is not None
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.value_head  # float32 also where FSDP gathers weights in bfloat16
            values = functional.linear(hidden.float(), head.weight.float(), head.bias.float()).squeeze(-1)
        return logits, values

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters trained at the value learning rate."""
        modules = [module for module in (self.value_head, self.critic) if module is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def teacher_forced(
    model: nn.Module, inputs: PassInputs, encoder_decoder: bool, pad_token_id: int, *, with_hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One forward pass over prompt and response.

    Decoder-only: the last response token is not fed (nothing follows it), positions count real tokens only, and only
    the logits that predict response tokens are computed where the model allows it. Encoder-decoder: the prompt is the
    encoder's input and the response, shifted right, the decoder's.

    Args:
        model: a transformers (or peft) language model.
        inputs: ids and masks.
        encoder_decoder: which of the two it is.
        pad_token_id: put where the masks are False.
        with_hidden: also return the input of the output embedding (the last hidden state).

    Returns:
        Logits ``(batch, response, vocabulary)`` and, if asked for, hidden states ``(batch, response, width)``.
    """
    seen: list[Tensor] = []
    handle = None
    if with_hidden:
        # The output embedding's own input: the last hidden state after the final norm (and T5's scaling), without
        # output_hidden_states, which would keep every layer's.
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        if encoder_decoder:
            logits = _encoder_decoder_pass(model, inputs, pad_token_id)
        else:
            logits = _decoder_only_pass(model, inputs, pad_token_id)
    finally:
        if handle is not None:
            handle.remove()
    length = inputs.response_ids.shape[1]
    hidden = seen[0][:, -length:] if seen else None
    return logits[:, -length:], hidden


def _decoder_only_pass(model: nn.Module, inputs: PassInputs, pad_token_id: int) -> Tensor:
    response = inputs.response_ids.masked_fill(~inputs.response_mask, pad_token_id)
    ids = torch.cat([inputs.prompt_ids, response[:, :-1]], dim=1)
    mask = torch.cat([inputs.prompt_mask, inputs.response_mask[:, :-1]], dim=1).long()
    accepted = _forward_parameters(model)
    arguments = {}
    if "position_ids" in accepted:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = inputs.response_ids.shape[1]
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments).logits


def _encoder_decoder_pass(model: nn.Module, inputs: PassInputs, pad_token_id: int) -> Tensor:
    start = model.config.decoder_start_token_id
    if start is None:
        start = model.generation_config.decoder_start_token_id
    response = inputs.response_ids.masked_fill(~inputs.response_mask, pad_token_id)
    decoder_ids = torch.cat([torch.full_like(response[:, :1], start), response[:, :-1]], dim=1)
    decoder_mask = torch.cat([torch.ones_like(inputs.response_mask[:, :1]), inputs.response_mask[:, :-1]], dim=1)
    return model(
        input_ids=inputs.prompt_ids,
        attention_mask=inputs.prompt_mask.long(),
        decoder_input_ids=decoder_ids,
        decoder_attention_mask=decoder_mask.long(),
        use_cache=False,
    ).logits


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    """Argument names of the underlying model's forward (peft's own takes anything)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)
