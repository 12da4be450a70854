"""A trained model in the form in which something else loads it, and the check that it is still the same model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from cagsr.config import ModelConfig
from cagsr.errors import ConfigError, RunError
from cagsr.flow import EncodedPrompt
from cagsr.models.files import adapter_base, is_adapter, loading
from cagsr.models.load import LoadedModel, load_model
from cagsr.runs.saved import (
    DIFFERS,
    TOKENS,
    Probe,
    Saved,
    chosen_dtype,
    greedy_probe,
    save_adapter_compared,
    save_compared,
    write_tokenizer,
)
from cagsr.support.atomic import disk_errors, replace_folder
from cagsr.support.extras import require
from cagsr.support.progress import working

CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's, of which this is the name in its repository."""
HELD = ("checkpoints", "run.lock", "metrics.jsonl")
"""What a run's folder holds."""
LEAST_AGREEMENT = 0.9
"""Share of the positions at which a GGUF file must find the same token likeliest: rounding to 8 bits leaves 0.97 and more."""


@dataclass(frozen=True)
class Checked:
    """How near an exported model is to the policy, at the tokens of its own greedy answers."""

    same_token: float
    """Share of the positions at which both find the same token likeliest."""
    mean: float
    """Mean difference of the log-probabilities, nats."""
    largest: float

    @property
    def sentence(self) -> str:
        """For the user."""
        return (
            f"loaded again and compared: the likeliest token is the same at {self.same_token:.1%} of the positions, "
            f"log-probabilities differ by {self.mean:.1g} nats on average, {self.largest:.1g} at most"
        )


def export_merged(loaded: LoadedModel, place: Path, dtype: str, prompts: Sequence[EncodedPrompt]) -> Saved:
    """Write the whole model, adapters merged, as safetensors with its tokenizer; compared as a run's own ``final/`` is.

    RunError: what was written is not the model that was read.
    """
    probe = greedy_probe(loaded, prompts, TOKENS)
    card = Path(loaded.path) / "README.md"
    texts = {"README.md": card.read_text(encoding="utf-8")} if card.is_file() else {}
    kept = place.with_name(f"{place.name}-{DIFFERS}")
    with replace_folder(place) as temporary:
        return save_compared(
            temporary,
            loaded.model,
            loaded,
            probe,
            chosen_dtype(dtype, loaded),
            loaded.model.generation_config,
            texts=lambda _: texts,
            place=place,
            kept=kept,
        )


def export_adapter(
    config: ModelConfig, place: Path, dtype: str, prompts: Callable[[Any], Sequence[EncodedPrompt]]
) -> str:
    """Write an adapter alone, in another precision, and compare base + adapter; a sentence for the user.

    ``prompts`` encodes what the comparison begins with, by the tokenizer that it was trained with.

    ConfigError: the model is no PEFT adapter; RunError: what was written is not what was read.
    """
    from peft import PeftModel

    path = config.path
    if not is_adapter(path):
        raise ConfigError(
            f"--form adapter: {path} is no PEFT adapter (no adapter_config.json); name a run's final-adapter/, or export "
            "the whole model with --form merged."
        )
    base = load_model(replace(config, path=adapter_base(path)), for_training=False)
    if (Path(path) / "tokenizer_config.json").is_file():  # the vocabulary may have grown when it was trained
        with loading(f"--model {path}: its tokenizer can't be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(path)
        if len(tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
            base.model.resize_token_embeddings(len(tokenizer))
            base = replace(base, tokenizer=tokenizer, grown=True)
    adapted: Any = PeftModel.from_pretrained(base.model, path)
    probe = greedy_probe(base, prompts(base.tokenizer), TOKENS)
    before = probe(adapted).logits
    precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for name, parameter in adapted.named_parameters():
        if adapted.prefix in name:
            parameter.data = parameter.data.to(precision).float()
    kept = place.with_name(f"{place.name}-{DIFFERS}")
    save_adapter_compared(place, adapted, base, probe, kept=kept, dtype=precision)
    copy_card(Path(path), place)
    return f"Saved in {str(precision).removeprefix('torch.')}, {compared(before, probe(adapted).logits).sentence}."


@working("converting to GGUF")
def export_gguf(
    config: ModelConfig,
    loaded: LoadedModel,
    place: Path,
    outtype: str,
    script: Path,
    prompts: Sequence[EncodedPrompt],
) -> str:
    """Write a GGUF file by llama.cpp's converter (``find_converter``), read it again and compare; a sentence for the user.

    RunError: the converter fails, or what it wrote is another model.
    """
    probe = greedy_probe(loaded, prompts, TOKENS)
    trained = probe(loaded.model)
    with disk_errors(place), tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as folder:
        source, made = Path(folder) / "model", Path(folder) / "model.gguf"
        loaded.model.save_pretrained(source)
        write_tokenizer(source, loaded)
        command = [sys.executable, str(script), str(source), "--outfile", str(made), "--outtype", outtype]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode != 0 or not made.is_file():
            told = (found.stderr.strip() or found.stdout.strip()).splitlines()[-1:] or ["it wrote no file"]
            raise RunError(f"{script} failed ({told[0]}); {place} was not written.")
        again = load_model(replace(config, path=str(made)), for_training=False)
        checked = compared(trained.logits, _at(probe, again.model))
        if checked.same_token < LEAST_AGREEMENT:
            raise RunError(
                f"{place} was not written, because what {script.name} made is another model ({checked.sentence}); try --outtype "
                "f16, and a converter that knows this architecture."
            )
        others = [
            one.prompt.text
            for one in prompts
            if again.tokenizer(one.prompt.text)["input_ids"] != loaded.tokenizer(one.prompt.text)["input_ids"]
        ]
        os.replace(made, place)
    note = f" Its tokenizer cuts {others[0]!r} otherwise than the model's: look at its BOS token." if others else ""
    return f"Written as {outtype}, {checked.sentence}.{note}"


def copy_card(model: Path, place: Path) -> None:
    """Have a model's card go along, where it has one."""
    if (card := model / "README.md").is_file():
        shutil.copyfile(card, place / card.name)


def find_converter(named: str | None) -> Path:
    """llama.cpp's converter: the one that was named, in ``$LLAMA_CPP``, or on the path.

    ConfigError where there is none, or nothing here could read what it writes.
    """
    require("--format gguf, which reads the file again,", "gguf")
    places = [named, os.environ.get("LLAMA_CPP"), shutil.which(CONVERTER)]
    for place in (Path(one) for one in places if one):
        for file in (place, place / CONVERTER):
            if file.is_file():
                return file
    raise ConfigError(
        f"--format gguf: llama.cpp's {CONVERTER} is not at hand; name it with --converter, set LLAMA_CPP to llama.cpp's folder, "
        "or convert the folder that --format safetensors writes elsewhere."
    )


def compared(trained: Tensor, found: Tensor) -> Checked:
    """Compare logits ``(positions, vocabulary)``; a vocabulary that was filled up is cut to the policy's."""
    found = found[:, : trained.shape[1]]
    same = (trained.argmax(dim=-1) == found.argmax(dim=-1)).float().mean()
    off = (trained.log_softmax(dim=-1) - found.log_softmax(dim=-1)).abs()
    likely = off.gather(1, trained.argmax(dim=-1, keepdim=True))
    return Checked(float(same), float(likely.mean()), float(likely.max()))


def _at(probe: Probe, model: nn.Module) -> Tensor:
    """What another model gives for the texts of a probe."""
    return probe(model).logits


def free(place: Path, config: ModelConfig, *, file: bool, overwrite: bool) -> None:
    """See that nothing is lost by what will be written; ConfigError. ``file``: it will be one and no folder."""
    model = Path(config.path)
    if place.is_dir() and file:
        raise ConfigError(
            f"--output {place}: a folder, and --format gguf writes a file; name one, as {place / 'model.gguf'}."
        )
    if place.is_file() and not file:
        raise ConfigError(f"--output {place}: a file, and a folder is to be written; name another place.")
    if any(one.exists() and not one.is_dir() for one in place.parents):
        raise ConfigError(f"--output {place}: one of the folders above it is a file; name another place.")
    if model.exists() and (model.resolve() == place or place in model.resolve().parents):
        raise ConfigError(f"--output {place}: the model {config.path} is in it; name another place.")
    if any((place / name).exists() for name in HELD):
        raise ConfigError(f"--output {place}: that is a run's folder; name another place.")
    if place.exists() and (file or any(place.iterdir())) and not overwrite:
        raise ConfigError(f"--output {place}: there is something already; name another place, or give --overwrite.")
