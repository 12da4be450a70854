"""``cagsr export``: a trained model in the form in which something else serves it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cagsr.config import ModelConfig
from cagsr.config.training import SaveDtype
from cagsr.support.progress import say

TEXTS = ("The", "In the morning", "Question: what is a tree?\nAnswer:", "Once upon a time there was")
"""What the comparison begins with, where no --prompt is given."""


@dataclass(frozen=True)
class Config:
    """Write a trained model for serving, load it again and compare it with the policy."""

    model: ModelConfig
    output: str
    """Folder to write, or with --format gguf the file."""
    format: Literal["safetensors", "gguf", "onnx"] = "safetensors"
    """safetensors: transformers, vLLM, TGI; gguf: llama.cpp, Ollama (by llama.cpp's converter); onnx: ONNX Runtime (by
    transformers' own exporter)."""
    form: Literal["merged", "adapter"] = "merged"
    """merged: the whole model; adapter: a run's final-adapter/ alone, for peft and vLLM's multi-LoRA."""
    dtype: SaveDtype = "auto"
    """Precision of safetensors; auto takes the model's own, of adapters float32."""
    outtype: str = "f16"
    """Precision of a GGUF file, as llama.cpp's converter names it: f32, f16, bf16, q8_0."""
    converter: str | None = None
    """llama.cpp's convert_hf_to_gguf.py, or its folder; None: $LLAMA_CPP, or the path."""
    prompt: str | None = None
    """A prompt as users ask them: the models are compared on its answer; None: on a few plain texts."""
    overwrite: bool = False
    """Replace what is there."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.form == "adapter" and self.format != "safetensors":
            yield f"--form adapter is written as safetensors alone: leave --format {self.format} out, or give --form merged."
        if self.format != "safetensors" and self.dtype != "auto":
            yield f"--dtype is the precision of safetensors: with --format {self.format} leave it out (--outtype for gguf)."
        if self.format != "gguf" and self.converter is not None:
            yield "--converter is for --format gguf."


def run(config: Config) -> None:
    """Write, compare, and say what was made."""
    from cagsr.flow import EncodedPrompt, Prompt
    from cagsr.models.load import load_model
    from cagsr.prompts.encode import TextEncoder
    from cagsr.runs.export import export_adapter, export_gguf, export_merged, find_converter, free
    from cagsr.runs.onnx import export_onnx
    from cagsr.support.atomic import disk_errors

    place = Path(config.output).resolve()
    free(place, config.model, file=config.format == "gguf", overwrite=config.overwrite)
    # Looked for before a model is loaded for nothing.
    script = find_converter(config.converter) if config.format == "gguf" else None
    texts = list(TEXTS) if config.prompt is None else [config.prompt]
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)

    def prompts(tokenizer: Any) -> list[EncodedPrompt]:
        encoder = TextEncoder(tokenizer)
        ids = [encoder.encode(text, add_special_tokens=True).ids for text in texts]
        # Which words matter makes no difference here.
        return [EncodedPrompt(Prompt(1, text), own, (-1,) * len(own), ()) for text, own in zip(texts, ids, strict=True)]

    if config.form == "adapter":
        say(f"{place}: {export_adapter(config.model, place, config.dtype, prompts)}")
        return
    loaded = load_model(config.model, for_training=False)
    say(*loaded.notes)
    asked = prompts(loaded.tokenizer)
    if script is not None:
        told = export_gguf(config.model, loaded, place, config.outtype, script, asked)
    elif config.format == "onnx":
        told = export_onnx(loaded, place, asked)
    else:
        told = export_merged(loaded, place, config.dtype, asked).sentence
    say(f"{place}: {told}")
