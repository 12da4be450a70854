"""The policy and, for GAE, its value estimates in one module: one teacher-forced pass gives both.

The module is what accelerate wraps, so that every parameter is used through one ``forward``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from cagsr.config import PPOConfig
from cagsr.errors import ModelError
from cagsr.models.architecture import teacher_forced
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.output_layer import Statistics
from cagsr.models.token_pass import token_statistics


class ActorCritic(nn.Module):
    """A policy with an optional value head or critic.

    ``value`` is ``none`` (value-free estimators), ``head`` (linear, on the policy's last hidden state) or ``model`` (a copy of
    the policy's weights with a head of its own).
    """

    def __init__(self, loaded: LoadedModel, value: str = "none") -> None:
        super().__init__()
        self.policy = loaded.model
        self.architecture = loaded.architecture
        self.pad_token_id = loaded.pad_token_id
        self.logit_rule = loaded.logit_rule
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

    def forward(self, inputs: PassInputs, statistics: Statistics, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run prompt + response through the model with the sampled tokens as input (teacher forcing).

        Gives ``statistics`` of the next-token distributions of the tokens ``at`` ``(batch, response)`` bool, as
        :func:`token_statistics`, and the values ``(batch, response)`` float32 there, None without a value head.
        """
        found, hidden = token_statistics(
            self.policy,
            self.architecture,
            inputs,
            self.pad_token_id,
            self.logit_rule,
            statistics,
            at,
            with_hidden=self.value_head is not None and self.critic is None,
        )
        if self.value_head is None:
            return found, None
        if self.critic is not None:
            _, hidden = teacher_forced(
                self.critic, self.architecture, inputs, self.pad_token_id, with_hidden=True, with_logits=False
            )
        assert hidden is not None
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.value_head  # float32 also where FSDP gathers weights in bfloat16
            values = functional.linear(hidden.float(), head.weight.float(), head.bias.float()).squeeze(-1)
        return found, values

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters trained at the value learning rate."""
        modules = [module for module in (self.value_head, self.critic) if module is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
