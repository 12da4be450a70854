"""Adapters put into their base's weights, and adapters on matrices that a model uses twice: the two are made apart, or refused.

Many models use one matrix as embedding and as output head. An adapter belongs to one of its uses, so the trained model has
two matrices, and merging the adapter into the one would change the other use as well.
"""

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from cagsr.attention.probe import hears, silence
from cagsr.errors import ConfigError, ModelError

UNTIED = "Untied:"
"""How the sentence about matrices that were made apart begins."""


def merge_adapter(base: PreTrainedModel, path: str, what: str) -> tuple[PreTrainedModel, str | None]:
    """Merge the adapter in a folder into its base, in place, and see that the result is the same model; ``what`` opens
    messages.

    ``base`` is as it was when the adapter was trained. Gives the merged model, and a sentence where a matrix that the base
    uses twice had to be made two (:func:`untie_adapted`). ModelError: the adapter does not fit, can't be merged, or merging
    makes another model.
    """
    try:
        policy = PeftModel.from_pretrained(base, path).eval()
        untied = untie_adapted(policy, "of the adapter")
        before = _tiny_logits(policy, base)[0].float()
        merged: PreTrainedModel = policy.merge_and_unload(safe_merge=True)
        after = _tiny_logits(merged, base)[0].float()
    except (ValueError, KeyError, RuntimeError, AttributeError, SafetensorError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"{what} can't be merged into it ({type(error).__name__}: {reason}).") from error
    off = float((before - after).abs().max())
    if off > 0.1 * float(before.std()):  # rounding in bfloat16 is far less
        raise ModelError(
            f"{what} merged into it is another model (its logits differ by {off:.2g}); merge it with peft."
        )
    return merged, untied


def untie_adapted(policy: PeftModel, target_modules: str) -> str | None:
    """Give each use of a matrix with an adapter a matrix of its own, in place, and have the config say so.

    ``target_modules`` is the setting, for messages. Gives a sentence for the user, None where no adapted matrix is used
    twice. ConfigError: the architecture can't be saved with two matrices, or never runs the module that was named.
    """
    base = policy.get_base_model()
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    groups = [
        group for group in by_tensor.values() if len(group) > 1 and any(_is_adapted(base, name) for name in group)
    ]
    if not groups:
        return None
    names = sorted({_plain(name) for group in groups for name in group})
    adapted = sorted({_plain(name) for group in groups for name in group if _is_adapted(base, name)})
    refused = (
        f"--lora.target_modules {target_modules}: this {base.config.model_type} model uses one matrix for {_and(names)}"
    )
    before, ran = _tiny_logits(base, base, adapted)
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
    if not _is_built_apart(base, names) or not torch.equal(before, _tiny_logits(base, base)[0]):
        raise ConfigError(
            f"{refused}, and its architecture can't be saved with two; leave {_and(adapted)} out of the adapters or train all "
            "weights (--lora.r 0)."
        )
    return (
        f"{UNTIED} {_and(names)} were one matrix; with an adapter on {_and(adapted)} they become different ones, so the saved "
        "model has each (tie_word_embeddings: false) and is larger by that."
    )


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
def _tiny_logits(model: nn.Module, base: PreTrainedModel, watched: Iterable[str] = ()) -> tuple[torch.Tensor, set[str]]:
    """Logits of a few tokens spread over the vocabulary, and which of some of the base's modules ran."""
    rows = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(0, rows, max(1, rows // 8), device=base.device)[None]
    ran: set[str] = set()
    with ExitStack() as stack:
        for name in watched:
            hook = base.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
            stack.callback(hook.remove)
        decoder = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
        read = {"encoder_outputs": silence(base)} if hears(base) else {"input_ids": ids}
        return model(**read, use_cache=False, **decoder).logits, ran


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
