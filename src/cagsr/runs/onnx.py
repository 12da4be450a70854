"""A trained model as an ONNX graph, by transformers' own exporter; run again and held to the policy's logits.

optimum's exporter does not know transformers 5. A decoder-only model becomes one graph that takes and gives keys and values,
so that it reads a prompt (with none) and goes on token by token; an encoder-decoder becomes one without, run whole for each token.
"""

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import GENERATION_CONFIG_NAME

from cagsr.errors import ConfigError, RunError
from cagsr.flow import EncodedPrompt
from cagsr.models.decoder_only import forward
from cagsr.models.hearing import Hearing
from cagsr.models.lengths import length_borders
from cagsr.models.load import LoadedModel
from cagsr.runs.export import compared, copy_card
from cagsr.runs.saved import PLAIN, TOKENS, greedy_probe, unlike
from cagsr.support.atomic import replace_folder
from cagsr.support.extras import require
from cagsr.support.progress import working

MASKED = 2
"""Padding in the example that is traced: of a mask without any the graph would keep nothing, and padding would be read."""


@working("exporting to ONNX")
def export_onnx(loaded: LoadedModel, place: Path, prompts: Sequence[EncodedPrompt]) -> str:
    """Write an ONNX folder in float32 with its tokenizer, run it and compare; a sentence for the user.

    ConfigError: what it needs is not installed, or the model is one that no graph holds; RunError: the exporter fails, or what
    it wrote is another model.
    """
    if isinstance(loaded.vision, Hearing):
        raise ConfigError("--format onnx: the graphs take texts, and this model hears; export safetensors instead.")
    require("--format onnx", "onnx")
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

    if borders := length_borders(loaded.model):
        raise ConfigError(
            f"--format onnx: this {loaded.model.config.model_type} model changes its rotary frequencies beyond {borders[0]:,} "
            "tokens, and a graph would keep those of the example it is made from; export safetensors instead."
        )
    probe, model = greedy_probe(loaded, prompts, TOKENS), _plain(loaded.model)
    example = _sequence_example(model) if loaded.architecture.one_sequence else _pair_example()
    trained = probe(model)
    with replace_folder(place) as folder:
        try:
            with _quiet(), torch.no_grad():
                OnnxExporter().export(model, example, OnnxConfig(dynamic=True)).save_pretrained(folder)
                found = probe(_Graph(ExportedModel.from_pretrained(folder, device="cpu"), model, example))
        except Exception as error:  # torch's tracer, the translator and the runtime raise whatever they do
            told = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise RunError(
                f"{place} was not written: transformers' ONNX exporter fails on this {model.config.model_type} model ({told[0]})."
            ) from error
        if problem := unlike(found, trained):
            raise RunError(f"{place} was not written, because the ONNX graph is another model ({problem}).")
        loaded.tokenizer.save_pretrained(folder)
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)
        copy_card(Path(loaded.path), folder)
    return f"Written as ONNX in float32, {compared(trained.logits, found.logits).sentence}."


def _plain(model: nn.Module) -> PreTrainedModel:
    """The model in float32 on the CPU, with an attention that can be traced: itself where it is that already."""
    assert isinstance(model, PreTrainedModel)
    plain = model.config._attn_implementation in PLAIN
    if model.device.type == "cpu" and model.dtype == torch.float32 and plain:
        return model
    found = copy.deepcopy(model).to("cpu", torch.float32)
    if not plain:
        found.set_attn_implementation(PLAIN[0])
    return found


def _sequence_example(model: PreTrainedModel) -> dict[str, Any]:
    """Three tokens of three rows behind the keys and values of five, one row padded; in the graph any of these sizes may differ."""
    ids = torch.ones(3, 8, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :MASKED] = 0
    with torch.no_grad():
        cache = forward(model, ids[:, :5], mask[:, :5], 1, use_cache=True).past_key_values
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    example = {"input_ids": ids[:, 5:], "attention_mask": mask, "position_ids": positions[:, 5:]}
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in example.items() if name in accepted} | {"past_key_values": cache}


def _pair_example() -> dict[str, Any]:
    """Three rows of a prompt and an answer, one of them padded."""
    ids, answer = torch.ones(3, 8, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
    mask, answer_mask = torch.ones_like(ids), torch.ones_like(answer)
    mask[0, -MASKED:] = answer_mask[0, -MASKED:] = 0
    pair = {"decoder_input_ids": answer, "decoder_attention_mask": answer_mask}
    return {"input_ids": ids, "attention_mask": mask, **pair, "use_cache": False}


class _Graph(nn.Module):
    """An ONNX graph in the policy's place: a sequence is read in two parts, the second behind the keys and values of the first."""

    def __init__(self, exported: Any, model: PreTrainedModel, example: dict[str, Any]) -> None:
        super().__init__()
        self.exported, self.config, self.generation_config = exported, model.config, model.generation_config
        self.cache = example.get("past_key_values")
        self.device_of = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Any = None, **others: Any) -> Any:
        """As the model's own forward."""
        others.pop("use_cache")
        if self.cache is None:
            return self.exported(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **others)
        half = input_ids.shape[1] // 2
        parts, cache = [], _empty(self.cache, len(input_ids))
        for start, end in ((0, half), (half, input_ids.shape[1])):
            span = {"input_ids": input_ids[:, start:end], "position_ids": position_ids[:, start:end]}
            output = self.exported(**span, attention_mask=attention_mask[:, :end], past_key_values=cache)
            parts.append(output.logits)
            cache = output.past_key_values
        return CausalLMOutput(logits=torch.cat(parts, dim=1))


def _empty(cache: Any, rows: int) -> Any:
    """A cache of the same layers that holds nothing yet, for so many rows."""
    found = copy.deepcopy(cache)
    for layer in found.layers:
        layer.keys, layer.values = (one[:1, :, :0].expand(rows, -1, -1, -1) for one in (layer.keys, layer.values))
        if layer.is_sliding:
            layer.cumulative_length = 0
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what the exporter tells of its own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
