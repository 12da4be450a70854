"""Supervised fine-tuning on TRL's SFTTrainer: the start for reinforcement learning, where there are pairs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from cagsr import __version__
from cagsr.config import ModelConfig, SftConfig
from cagsr.errors import ModelError
from cagsr.models.architecture import architecture_of
from cagsr.models.files import check_files
from cagsr.models.load import LoadedModel, load_model
from cagsr.pairs import IGNORED, encode_pairs, unending
from cagsr.runs.saved import TEXTS, AnswerProbe, Saved, dtype_note, saved_facts
from cagsr.runs.trainer_folder import (
    check_adapted_head,
    check_trainer_config,
    length_limit,
    mean_of,
    open_trainer_folder,
    run_trainer,
    save_trained,
    say_done,
    settings_file,
    trainer_arguments,
)

COMMAND = "sft"
SETTINGS = settings_file(COMMAND)


def sft(config: SftConfig, *, quiet: bool = False) -> Path:
    """Fine-tune a decoder-only model on prompt-completion pairs and save it in Hugging Face layout.

    The loss is on the completions only, each ended by the end token (a conversation's by what its chat template ends the
    assistant's turn with); nothing is packed. With LoRA the saved model is the
    merged one and ``adapter/`` holds the adapter alone.

    Args:
        config: see ``SftConfig``.
        quiet: print nothing (the quickstart shows its own progress).

    Returns:
        The output folder.

    Raises:
        CagsrError: bad input, in one sentence (see ``load_model`` and ``encode_pairs``); an output folder that holds
            something else; an encoder-decoder model.
    """
    folder = Path(config.output_dir)
    check_trainer_config(config, COMMAND)
    loaded = _load(config)
    check_adapted_head(loaded, config.lora, COMMAND)
    limit = length_limit(config, loaded)
    read: list[str] = []
    pairs, dropped = encode_pairs(config, loaded.tokenizer, limit, read)
    notes = [*loaded.notes, f"{len(pairs):,} pairs from {config.data.path}.", *read]
    notes += unending([pair["input_ids"] for pair in pairs], loaded.stop_ids)
    notes.append(dtype_note(config.save_dtype, loaded, "--save_dtype"))
    if dropped:
        notes.append(f"{dropped:,} pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop).")
    checkpoint = open_trainer_folder(config, COMMAND, notes)
    trainer = SFTTrainer(
        model=loaded.model,
        args=_arguments(config, loaded, limit),
        train_dataset=Dataset.from_list(pairs),
        processing_class=loaded.tokenizer,
    )
    run_trainer(trainer, folder, checkpoint, notes, quiet=quiet)
    if trainer.is_world_process_zero():

        def texts(saved: Saved) -> dict[str, str]:
            loss = mean_of(trainer, "loss")
            return {"README.md": _card(config, len(pairs), trainer.state.global_step, loss, saved_facts(loaded, saved))}

        # An adapter on random weights is of no use without them.
        saved = save_trained(trainer, config, loaded, _probe(loaded, pairs), texts, adapter=not config.from_scratch)
        if not quiet:
            print(saved.sentence)
            say_done(trainer, folder)
    return folder


def _probe(loaded: LoadedModel, pairs: Sequence[Mapping[str, Sequence[int]]]) -> AnswerProbe:
    """The first pairs, each parted where its answer begins."""
    texts = []
    for pair in pairs[:TEXTS]:
        ids, first = pair["input_ids"], next(at for at, label in enumerate(pair["labels"]) if label != IGNORED)
        texts.append((ids[:first], ids[first:]))
    return AnswerProbe(loaded, texts)


def _load(config: SftConfig) -> LoadedModel:
    """Load the model, or make one with random weights."""
    torch.manual_seed(config.seed)  # fresh adapters, and rows of a vocabulary that grows
    if config.from_scratch:
        with _random_weights(config.model, config.seed) as path:
            try:
                loaded = load_model(replace(config.model, path=path), config.lora)
            except ModelError as error:
                raise ModelError(str(error).replace(path, config.model.path)) from error
        loaded = replace(loaded, notes=(*loaded.notes, f"Random weights from seed {config.seed} (--from_scratch)."))
    else:
        loaded = load_model(config.model, config.lora)
    if not loaded.architecture.one_sequence:
        raise ModelError(
            f"--model {config.model.path} is an encoder-decoder model, and sft (TRL) trains decoder-only ones; fine-tune "
            "it with transformers' Seq2SeqTrainer, then go on with cagsr train."
        )
    if loaded.tokenizer.eos_token_id is None:
        raise ModelError(f"--model {config.model.path}: the tokenizer names no EOS token, so no answer could ever end.")
    return loaded


@contextmanager
def _random_weights(config: ModelConfig, seed: int) -> Iterator[str]:
    """Yield a temporary folder with a random model of ``config``'s architecture and its tokenizer."""
    check_files(config.path, f"--model {config.path}", weights=False)
    try:
        model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"--model {config.path}: --from_scratch needs a config.json and a tokenizer there ({reason})"
        ) from error
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM
    if not architecture_of(model_config).one_sequence:
        raise ModelError(f"--model {config.path} is an encoder-decoder model, and sft (TRL) trains decoder-only ones.")
    model = auto.from_config(model_config, trust_remote_code=config.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="cagsr-scratch-") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        yield path


def _arguments(config: SftConfig, loaded: LoadedModel, limit: int | None) -> SFTConfig:
    with warnings.catch_warnings():
        # TRL's own default uses a name that transformers has renamed; the new one is unknown to older versions.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*checkpointing.*")
        return SFTConfig(
            **trainer_arguments(config, loaded, _learning_rate(config)),
            max_length=limit,
            packing=False,
            completion_only_loss=True,
            dataset_kwargs={"skip_prepare_dataset": True},  # encode_pairs has done it
        )


def _learning_rate(config: SftConfig) -> float:
    if config.learning_rate is not None:
        return config.learning_rate
    return 2e-4 if config.lora.r > 0 else 1e-3 if config.from_scratch else 2e-5


def _card(config: SftConfig, pairs: int, steps: int, loss: float | None, saved: str) -> str:
    origin = "from random weights" if config.from_scratch else f"from `{config.model.path}`"
    told = f" The mean training loss over the last steps was {loss:.3f}." if loss is not None else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [cagsr, sft, trl]
---

# {Path(config.output_dir).name}

Supervised fine-tuning {origin} with `cagsr sft` {__version__} (TRL's SFTTrainer).

- Data: {pairs:,} prompt-completion pairs from `{config.data.path}`; the loss is on the completions only.
- {steps:,} steps of {config.batch_size} pairs, peak learning rate {_learning_rate(config):g}, seed {config.seed}.{told}
{saved}
- All settings: `{SETTINGS}`.

## Limits

The model imitates its training answers, their mistakes included. It was not evaluated here: see `cagsr diagnose`.
"""
