"""The parts of a model read from its folder or the Hub: config, tokenizer, weights; a PEFT adapter with its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cagsr.config import ModelConfig
from cagsr.errors import ModelError
from cagsr.models.architecture import architecture_of
from cagsr.models.files import adapter_base, check_files, is_adapter, weights_note, weights_problem

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Precisions that weights are saved in, by their names in safetensors."""


def load_parts(
    config: ModelConfig, dtype: torch.dtype, notes: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype, bool]:
    """The model, its tokenizer, its files' precision, and whether a matrix that it uses twice was made two.

    Of a PEFT adapter it is the base with the adapter merged into it.

    Args:
        config: which model.
        dtype: precision of the weights in memory.
        notes: sentences for the user are added to it.

    Raises:
        ModelError: anything of it can't be used, in one sentence.
    """
    check_files(config.path, f"--model.path {config.path}")
    if is_adapter(config.path):
        return _load_adapter(config, dtype, notes)
    model_config = _load_config(config)
    _check_weights(config.path)
    tokenizer = _load_tokenizer(config)
    stored_dtype = _stored_dtype(config.path, model_config)
    return _load_weights(config, model_config, dtype, notes), tokenizer, stored_dtype, False


def _load_adapter(
    config: ModelConfig, dtype: torch.dtype, notes: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype, bool]:
    from cagsr.models.adapter import merge_adapter  # brings peft, which takes its time

    base = adapter_base(config.path)
    what = f"--model.path {config.path}: is a PEFT adapter for {base}, and"
    if not (Path(config.path) / "adapter_model.safetensors").is_file():
        raise ModelError(f"{what} has no adapter_model.safetensors; pickled weights are never loaded.")
    try:
        model, tokenizer, stored_dtype, _ = load_parts(replace(config, path=base), dtype, notes)
    except ModelError as error:
        raise ModelError(f"{what} its base can't be loaded ({str(error).rstrip('.')}).") from error
    if (Path(config.path) / "tokenizer_config.json").is_file():
        tokenizer = _load_tokenizer(config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as it was when the adapter was trained
    merged, made_two = merge_adapter(model, config.path, what)
    notes.append(f"{config.path} is a PEFT adapter: loaded on its base {base} and merged into it.")
    notes += [made_two] if made_two else []
    return merged, tokenizer, stored_dtype, made_two is not None


def _load_config(config: ModelConfig) -> PretrainedConfig:
    folder = Path(config.path)
    looks_local = folder.exists() or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ModelError(
            f"--model.path {config.path}: no such folder; give a folder in Hugging Face layout or a Hub id."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"--model.path {config.path}: the folder has no config.json, so it is not a transformers model."
        )
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"--model.path {config.path}: can't be loaded from this folder or the Hub ({reason})"
        ) from error


def _stored_dtype(path: str, config: PretrainedConfig) -> torch.dtype:
    """The precision of a model's files: what its config says, else what the first weights have."""
    declared = config.dtype or config.get_text_config().dtype
    if declared is None:
        for file in sorted(Path(path).glob("*.safetensors"))[:1]:
            with safe_open(file, framework="pt") as weights:
                kinds = [weights.get_slice(name).get_dtype() for name in weights.keys()]  # noqa: SIM118
            declared = next((_STORED[kind] for kind in kinds if kind in _STORED), None)
    return declared if declared in _STORED.values() else torch.float32


def _check_weights(path: str) -> None:
    """A local folder must hold safetensors: a pickle can run any code when it is opened."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"--model.path {path}: only pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are "
            "never loaded; convert them to safetensors first (model.save_pretrained in a place you trust)."
        )
    raise ModelError(f"--model.path {path}: the folder has no *.safetensors weights.")


def _load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--model.path {config.path}: its tokenizer can't be loaded ({reason})") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"--model.path {config.path}: {type(tokenizer).__name__} is a slow tokenizer without character offsets, which "
            "salience needs; save a fast tokenizer (tokenizer.json) with the model."
        )
    return tokenizer


def _load_weights(
    config: ModelConfig, model_config: PretrainedConfig, dtype: torch.dtype, notes: list[str]
) -> PreTrainedModel:
    auto = architecture_of(model_config).auto_class
    arguments = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        model, info = auto.from_pretrained(
            config.path,
            config=model_config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **arguments,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"--model.path {config.path}: the {model_config.model_type} model can't be loaded as a language model ({reason})"
        ) from error
    problem = weights_problem(info)
    if problem is not None:
        raise ModelError(f"--model.path {config.path}: {problem}.")
    unused = weights_note(info)
    if unused is not None:
        notes.append(unused)
    return model
