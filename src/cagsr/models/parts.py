"""The parts of a model read from its folder or the Hub: config, tokenizer, weights; a PEFT adapter with its base."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cagsr.config import ModelConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.models.architecture import Architecture, architecture_of
from cagsr.models.files import adapter_base, check_files, check_safetensors, is_adapter, loading, weights_problem
from cagsr.models.gguf import Source, drop_foreign_tokens, find_source, make_plain, read_quantisation
from cagsr.models.hearing import Hearing
from cagsr.models.speech_to_text import SpeechToText
from cagsr.models.vision import KNOWN, NEEDS_IMAGE, Vision, load_tokenizer_of
from cagsr.support.extras import install_command, is_installed

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Precisions that weights are saved in, by their names in safetensors."""
_Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype, bool, Vision | Hearing | None]


def load_parts(config: ModelConfig, dtype: torch.dtype, notes: list[str]) -> _Parts:
    """The model in precision ``dtype``, its tokenizer, its files' precision, whether a matrix that it uses twice was made two,
    and what reads images or sounds for it (None: nothing does).

    Of a PEFT adapter it is the base with the adapter merged into it; of a GGUF file its weights dequantised, as any model's.
    Sentences for the user are added to ``notes``. Raises ModelError, in one sentence; ConfigError where a package is missing.
    """
    path, what = config.path, f"--model.path {config.path}"
    check_files(path, what)
    if is_adapter(path):
        return _load_adapter(config, dtype, notes)
    source = find_source(path, what)
    if source.gguf is None and Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{what}: the folder has no config.json, so it is not a transformers model.")
    model_config = stored_config(config)
    if source.gguf is None:
        check_safetensors(path, what)
    architecture = architecture_of(model_config)
    _check_hears(config, model_config, architecture)
    sight = _load_vision(config, source, model_config, notes)
    tokenizer = _load_tokenizer(config, source) if sight is None else load_tokenizer_of(sight)
    _check_fast(tokenizer, config.path)
    if source.gguf is None:
        stored_dtype = _stored_dtype(path, model_config)
    else:
        drop_foreign_tokens(tokenizer, model_config.get_text_config().vocab_size)
        found = read_quantisation(source.gguf)
        stored_dtype = found.dtype
        notes.append(
            f"GGUF: {source.gguf} ({found.name}), its weights dequantised to {str(dtype).removeprefix('torch.')}."
        )
    with loading(f"{what}: the {model_config.model_type} model can't be loaded as a language model"):
        model, info = architecture.auto_class.from_pretrained(
            source.path,
            config=model_config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
            **source.weight_options,
        )
    if (problem := weights_problem(info)) is not None:
        raise ModelError(f"{what}: {problem}.")
    senses: Vision | Hearing | None = sight
    if isinstance(architecture, SpeechToText):
        with loading(f"{what}: its feature extractor can't be loaded"):
            senses = Hearing.of(config, source.path, source.options, model_config, model.generation_config, tokenizer)
        notes.append(senses.note())
    if unused := sorted(info["unexpected_keys"]):
        notes.append(
            f"Weights: {len(unused):,} in the file have no place in this model and are left out ({unused[0]}, ...)."
        )
    if source.gguf is not None:
        make_plain(model, source.gguf)
    return model, tokenizer, stored_dtype, False, senses


def stored_config(config: ModelConfig) -> PretrainedConfig:
    """The transformers config of a model as it is stored, of an adapter its base's; ModelError."""
    path = adapter_base(config.path) if is_adapter(config.path) else config.path
    what = f"--model.path {path}"
    source = find_source(path, what)
    with loading(f"{what}: can't be loaded from this {'folder or the Hub' if source.gguf is None else 'GGUF file'}"):
        return AutoConfig.from_pretrained(source.path, trust_remote_code=config.trust_remote_code, **source.options)


def _load_adapter(config: ModelConfig, dtype: torch.dtype, notes: list[str]) -> _Parts:
    from cagsr.models.tied import merge_adapter  # brings peft, which takes its time

    base = adapter_base(config.path)
    what = f"--model.path {config.path}: is a PEFT adapter for {base}, and"
    if not (Path(config.path) / "adapter_model.safetensors").is_file():
        raise ModelError(f"{what} has no adapter_model.safetensors; pickled weights are never loaded.")
    try:
        model, tokenizer, stored_dtype, _, vision = load_parts(replace(config, path=base), dtype, notes)
    except ModelError as error:
        raise ModelError(f"{what} its base can't be loaded ({str(error).rstrip('.')}).") from error
    if (Path(config.path) / "tokenizer_config.json").is_file():
        tokenizer = _load_tokenizer(config, Source(config.path))
        _check_fast(tokenizer, config.path)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as it was when the adapter was trained
    merged, made_two = merge_adapter(model, config.path, what)
    notes.append(f"{config.path} is a PEFT adapter: loaded on its base {base} and merged into it.")
    notes += [made_two] if made_two else []
    return merged, tokenizer, stored_dtype, made_two is not None, vision


def _stored_dtype(path: str, config: PretrainedConfig) -> torch.dtype:
    """The precision of a model's files: what its config says, else what the first weights have."""
    declared = config.dtype or config.get_text_config().dtype
    if declared is None:
        for file in sorted(Path(path).glob("*.safetensors"))[:1]:
            with safe_open(file, framework="pt") as weights:
                kinds = [weights.get_slice(name).get_dtype() for name in weights.keys()]  # noqa: SIM118
            declared = next((_STORED[kind] for kind in kinds if kind in _STORED), None)
    return declared if declared in _STORED.values() else torch.float32


def _load_vision(
    config: ModelConfig, source: Source, model_config: PretrainedConfig, notes: list[str]
) -> Vision | None:
    """What reads images, for a model that sees and has its processor beside it."""
    if model_config.is_encoder_decoder or not hasattr(model_config, "vision_config") or source.gguf is not None:
        return None
    kind, why = model_config.model_type, "its kind is none of those that are"
    if not is_installed("PIL"):
        why = f"pillow is not installed ({install_command('images')})"
    elif kind in KNOWN:
        why = "it has no processor beside it"
        with loading(f"--model.path {config.path}: its processor can't be loaded"):
            vision = Vision.of(source.path, model_config, source.options)
        if vision is not None:
            return vision
    told = f"not read by this {kind} model, because {why} (docs/images.md)."
    if kind in NEEDS_IMAGE:
        raise ModelError(f"--model.path {config.path}: images are {told[:-1]}, and it takes no prompt without one.")
    notes.append(f"Images: {told}")
    return None


def _check_hears(config: ModelConfig, model_config: PretrainedConfig, architecture: Architecture) -> None:
    """ModelError for a model that reads sound in a way that isn't known; ConfigError for settings of sound where none is heard."""
    if isinstance(architecture, SpeechToText):
        return
    if type(model_config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING or type(model_config) in MODEL_FOR_CTC_MAPPING:
        raise ModelError(
            f"--model.path {config.path}: how {model_config.model_type} models read sound isn't known here; of those that do "
            "Whisper models are read (docs/audio.md)."
        )
    for name in ("language", "speech_task"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"--model.{name}: is for models that hear (Whisper), and {config.path} is a {model_config.model_type} model."
            )


def _load_tokenizer(config: ModelConfig, source: Source) -> PreTrainedTokenizerBase:
    with loading(f"--model.path {config.path}: its tokenizer can't be loaded"):
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=config.trust_remote_code, **source.options)


def _check_fast(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if not tokenizer.is_fast:
        raise ModelError(
            f"--model.path {path}: {type(tokenizer).__name__} is a slow tokenizer without character offsets, which "
            "salience needs; save a fast tokenizer (tokenizer.json) with the model."
        )
