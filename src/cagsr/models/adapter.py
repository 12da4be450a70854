"""A PEFT adapter that was saved alone, put into its base's weights."""

from __future__ import annotations

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from cagsr.errors import ConfigError, ModelError
from cagsr.models.tied import untie_adapted


def merge_adapter(base: PreTrainedModel, path: str, what: str) -> tuple[PreTrainedModel, str | None]:
    """Merge the adapter in a folder into its base model and see that the result is the same model.

    Args:
        base: as it was when the adapter was trained; it is changed in place.
        path: the adapter's folder.
        what: opens the message.

    Returns:
        The merged model, and a sentence where a matrix that the base uses twice had to be made two (``untie_adapted``).

    Raises:
        ModelError: the adapter does not fit, is of a kind that can't be merged, or merging it makes another model.
    """
    try:
        policy = PeftModel.from_pretrained(base, path).eval()
        untied = untie_adapted(policy, "of the adapter")
        before = _tiny_logits(policy, base)
        merged: PreTrainedModel = policy.merge_and_unload(safe_merge=True)
        after = _tiny_logits(merged, base)
    except (ValueError, KeyError, RuntimeError, AttributeError, SafetensorError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"{what} can't be merged into it ({type(error).__name__}: {reason}).") from error
    off = float((before - after).abs().max())
    if off > 0.1 * float(before.std()):  # rounding in bfloat16 is far less
        raise ModelError(
            f"{what} merged into it is another model (its logits differ by {off:.2g}); merge it with peft."
        )
    return merged, untied


@torch.no_grad()
def _tiny_logits(policy: nn.Module, base: PreTrainedModel) -> torch.Tensor:
    """Logits of a few tokens spread over the vocabulary, in float32."""
    rows = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(0, rows, max(1, rows // 8))[None]
    decoder = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    return torch.Tensor(policy(input_ids=ids, use_cache=False, **decoder).logits.float())
