"""A linear probe on the hidden states of one layer, read in a forward pass that runs anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cagsr.attention.probe import layer_count, transformers_model
from cagsr.errors import ConfigError, ModelError
from cagsr.models.architecture import Architecture
from cagsr.models.decoder_only import of_batch
from cagsr.models.inputs import PassInputs


@dataclass(frozen=True)
class LayerProbe:
    """``weight`` ``(width,)`` float32 and ``bias`` of a linear function of what layer ``layer`` (from 0) gives."""

    layer: int
    weight: Tensor
    bias: float

    def check(self, model: nn.Module) -> None:
        """ConfigError where the model has no such layer, or hidden states of another width."""
        layers = len(layers_of(model))
        width = int(transformers_model(model).config.get_text_config(decoder=True).hidden_size)
        if self.layer not in range(layers) or len(self.weight) != width:
            raise ConfigError(
                f"The grounding probe is another model's: it reads {len(self.weight)} numbers of layer {self.layer}, and this "
                f"model has {width} in layers 0 to {layers - 1}; leave --reward.probe.path out, or name one learned from it."
            )

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect the probe's numbers of each forward of ``model`` inside the block, ``(rows, positions, 1)`` float32."""

        def judged(hidden: Tensor) -> Tensor:
            weight = self.weight.to(hidden.device)
            return functional.linear(hidden.float(), weight[None]) + self.bias

        with hidden_states_of(model, {self.layer: judged}) as seen:
            yield seen[self.layer]


@contextmanager
def hidden_states_of(
    model: nn.Module, layers: Mapping[int, Callable[[Tensor], Tensor]]
) -> Iterator[Mapping[int, list[Tensor]]]:
    """Collect what is made of the output of some layers, forward by forward, inside the block; no gradients."""
    seen: dict[int, list[Tensor]] = {number: [] for number in layers}

    def hook(number: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            seen[number].append(layers[number](hidden))

    blocks = layers_of(model)
    with ExitStack() as stack:
        for number in layers:
            stack.callback(blocks[number].register_forward_hook(partial(hook, number)).remove)
        yield seen


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of the stack that says the answer, a decoder's; ModelError where they are not found."""
    inner = transformers_model(model)
    count = layer_count(inner)
    stack = inner.get_decoder() if inner.config.is_encoder_decoder else inner
    for module in stack.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return module
    raise ModelError(
        f"The layers of a {inner.config.model_type} model are not found, so no probe can read their hidden states."
    )


def at_tokens(architecture: Architecture, model: nn.Module, inputs: PassInputs, seen: Sequence[Tensor]) -> Tensor:
    """What was collected, at the answers' own tokens: ``(batch, response, width)``, 0 at the last column.

    The last token of the longest answer is fed to nothing, so no layer has a hidden state of it.
    """
    fed, held_by = architecture.rows_fed(model, inputs)
    length = inputs.response_ids.shape[1]
    predicting = of_batch(architecture.hidden(seen, fed)[:, -length:], held_by)  # each token's predecessor's
    return functional.pad(predicting[:, 1:], (0, 0, 0, 1))
