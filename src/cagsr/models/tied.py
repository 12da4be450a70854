"""Adapters on matrices that a model uses twice: the two are made apart before training, or refused.

Many models use one matrix as embedding and as output head. An adapter belongs to one of its uses, so the trained model has
two matrices, and merging the adapter into the one would change the other use as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from cagsr.errors import ConfigError

UNTIED = "Untied:"
"""How the sentence about matrices that were made apart begins."""


def untie_adapted(policy: PeftModel, target_modules: str) -> str | None:
    """Give each use of a matrix with an adapter a matrix of its own, in place, and have the config say so.

    Args:
        policy: a model with fresh adapters.
        target_modules: the setting, for messages.

    Returns:
        A sentence for the user; None where no adapted matrix is used twice.

    Raises:
        ConfigError: the architecture can't be saved with two matrices, or it never runs the module that was named.
    """
    base = policy.get_base_model()
    groups = _adapted_groups(base)
    if not groups:
        return None
    names = sorted({_plain(name) for group in groups for name in group})
    adapted = sorted({_plain(name) for group in groups for name in group if _is_adapted(base, name)})
    refused = (
        f"--lora.target_modules {target_modules}: this {base.config.model_type} model uses one matrix for {_and(names)}"
    )
    before, ran = _tiny_logits(base, adapted)
    if idle := [name for name in adapted if name not in ran]:
        raise ConfigError(
            f"{refused}, and its forward pass never runs {idle[0]} itself, so an adapter there would learn nothing; leave it "
            "out or name a module that runs."
        )
    for group in groups:
        for name in group[1:]:
            module, _, parameter = name.rpartition(".")
            owner = base.get_submodule(module)
            old = getattr(owner, parameter)
            setattr(owner, parameter, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    for settings in {id(one): one for one in (base.config, base.config.get_text_config())}.values():
        settings.tie_word_embeddings = False
    base.all_tied_weights_keys = base.get_expanded_tied_weights_keys(all_submodels=True)
    if not _is_built_apart(base, names) or not torch.equal(before, _tiny_logits(base, adapted)[0]):
        raise ConfigError(
            f"{refused}, and its architecture can't be saved with two; leave {_and(adapted)} out of the adapters or train all "
            "weights (--lora.r 0)."
        )
    return (
        f"{UNTIED} {_and(names)} were one matrix; with an adapter on {_and(adapted)} they become different ones, so the saved "
        "model has each (tie_word_embeddings: false) and is larger by that."
    )


def _adapted_groups(base: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one tensor under several names, an adapter on at least one of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [group for group in groups.values() if len(group) > 1 and any(_is_adapted(base, name) for name in group)]


def _is_adapted(base: nn.Module, name: str) -> bool:
    return isinstance(base.get_submodule(_plain(name)), BaseTunerLayer)


def _plain(name: str) -> str:
    """The module that a parameter belongs to, by the name it has without adapters."""
    return name.rpartition(".")[0].removesuffix(".base_layer")


def _is_built_apart(base: PreTrainedModel, modules: list[str]) -> bool:
    """Whether the model's class, built anew from what will be stored of its config, has the matrices apart."""
    stored = base.config.to_dict()
    settings = type(base.config).from_dict(stored)
    if {**settings.to_dict(), "transformers_version": None} != {**stored, "transformers_version": None}:
        return False
    with torch.device("meta"):
        fresh = type(base)(settings)
    weights = [fresh.get_submodule(name).weight for name in modules]
    return len({id(weight) for weight in weights}) == len(weights)


@torch.no_grad()
def _tiny_logits(base: PreTrainedModel, watched: list[str]) -> tuple[torch.Tensor, set[str]]:
    """Logits of two tokens, and which of some modules ran."""
    ids = torch.ones(1, 2, dtype=torch.long, device=base.device)
    ran: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: ran.add(name)

    handles = [base.get_submodule(name).register_forward_hook(hook(name)) for name in watched]
    try:
        decoder = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
        return base(input_ids=ids, attention_mask=ids, use_cache=False, **decoder).logits, ran
    finally:
        for handle in handles:
            handle.remove()


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
