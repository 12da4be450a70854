"""Whether a model can read a prompt once for all its answers: asked of the model itself."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from cagsr.flow import EpisodeBatch
from cagsr.models.checkpointing import is_checkpointed
from cagsr.models.decoder_only import forward
from cagsr.models.inputs import PassInputs, SharedPrompts
from cagsr.models.load import LoadedModel


def shares_prompts(loaded: LoadedModel, rollout: EpisodeBatch) -> bool:
    """Whether this model can read a prompt once for all its answers: its log-probabilities are then the same.

    Asked of the model itself: by one tiny batch, once, and by the longest row of each rollout that is longer than all
    before it (with images and without), for what a cache forgets (a window, a border of its own) shows at some length only.
    False for caches whose
    rows can't be picked (state-space layers), under gradient checkpointing, which keeps no keys and values, and wherever
    the log-probabilities come out different. Weights that are divided among processes must be whole here.
    """
    model = loaded.model
    if is_checkpointed(model):
        return False
    if model not in _KNOWN:
        _KNOWN[model] = (_agrees_on_tiny_batch(loaded), 0, 0)
    agrees, *asked = _KNOWN[model]
    lengths = rollout.prompts.real.sum(dim=1) + rollout.real.sum(dim=1)
    images = rollout.prompts.images or (None,) * len(lengths)
    seen = torch.tensor([one is not None for one in images], device=lengths.device)
    for place, those in enumerate((~seen, seen)):  # what is read of images goes other ways
        longest = int(torch.where(those, lengths, 0).max())
        if agrees and longest > asked[place]:
            row = torch.where(those, lengths, 0).argmax().repeat(2)
            inputs = PassInputs(
                rollout.prompts.ids[row], rollout.prompts.real[row], rollout.ids[row], rollout.real[row]
            )
            own = images[int(row[0])]
            inputs = replace(inputs, images=None if own is None else (own, own))
            agrees, asked[place] = _agrees(loaded, inputs, torch.zeros_like(row)), longest
    _KNOWN[model] = (agrees, asked[0], asked[1])
    return agrees


def stop_sharing(model: nn.Module) -> None:
    """Read each prompt with each answer from now on: ``shares_prompts`` says no of this model."""
    _KNOWN[model] = (False, 0, 0)


def sharing_stopped(model: nn.Module) -> bool:
    """Whether ``shares_prompts`` has said no of this model; False where it was not asked yet."""
    return not _KNOWN.get(model, (True, 0, 0))[0]


_KNOWN: WeakKeyDictionary[nn.Module, tuple[bool, int, int]] = WeakKeyDictionary()
"""Whether a model's prompts can be shared, and the longest rows without and with images by which that was asked."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_PICKABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


def rows_can_be_picked(cache: Any) -> bool:
    """Whether every layer of a forward's ``past_key_values`` grows with its rows side by side, so that rows can be taken out.

    Not so state-space layers, static caches, and what is no ``Cache``.
    """
    if not isinstance(cache, Cache):
        return False
    parts = [part for name in ("self_attention_cache", "cross_attention_cache") if (part := getattr(cache, name, None))]
    if parts:
        return all(rows_can_be_picked(part) for part in parts)
    return all(type(layer) in _PICKABLE for layer in cache.layers)


@torch.no_grad()
def _agrees_on_tiny_batch(loaded: LoadedModel) -> bool:
    """Two prompts of different lengths, two answers each."""
    model, device = loaded.model, loaded.device
    ids = torch.arange(20, device=device).remainder(model.get_input_embeddings().weight.shape[0]).view(4, 5)
    prompt_ids = ids[[0, 0, 1, 1], :3]
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    prompt_mask[:2, -1 if loaded.architecture.padding_side == "right" else 0] = False
    response_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], device=device).bool()
    if loaded.architecture.one_sequence:
        with loaded.autocast():
            cache = forward(model, prompt_ids[:1], torch.ones_like(prompt_mask[:1]), 1, use_cache=True)
        if not rows_can_be_picked(getattr(cache, "past_key_values", None)):
            return False
    inputs = PassInputs(prompt_ids, prompt_mask, ids[:, 2:], response_mask)
    return _agrees(loaded, inputs, torch.tensor([0, 0, 1, 1], device=device))


@torch.no_grad()
def _agrees(loaded: LoadedModel, plain: PassInputs, group: Tensor) -> bool:
    """The last hidden states of both passes, side by side; ``group`` says which rows have the same prompt."""
    shared = replace(plain, shared=SharedPrompts.of(group))
    with loaded.autocast():
        found = [loaded.hidden_states(inputs).float()[plain.response_real] for inputs in (plain, shared)]
    largest = float(found[0].abs().max())
    return float((found[0] - found[1]).abs().max()) <= _TOLERANCE[loaded.compute_dtype] * max(1.0, largest)
