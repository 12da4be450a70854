"""Direct preference optimisation on TRL's DPOTrainer: preference pairs without a reward model and without sampling."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from cagsr import __version__
from cagsr.config import DpoConfig
from cagsr.errors import ModelError
from cagsr.models.load import LoadedModel, load_model
from cagsr.pairs import encode_answer, unending
from cagsr.preferences.pairs import BY_LENGTH, OrderByEpoch, PreferencePair, encode_all, read_preferences
from cagsr.preferences.split import subset
from cagsr.prompts.encode import TextEncoder, encode_prompt
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

COMMAND = "dpo"


def train_dpo(config: DpoConfig, *, quiet: bool = False) -> Path:
    """Train a decoder-only model on preference pairs with DPO (Rafailov et al., 2023, equation 7) and save it.

    Prompts and answers are encoded as ``cagsr sft`` encodes them, each answer ended by the end token. With LoRA the
    reference is the model with its adapter off, the saved model is the merged one and ``adapter/`` holds the adapter.

    Args:
        config: see ``DpoConfig``.
        quiet: print nothing.

    Returns:
        The output folder, a model in Hugging Face layout.

    Raises:
        CagsrError: bad input, in one sentence; an output folder that holds something else.
    """
    folder = Path(config.output_dir)
    check_trainer_config(config, COMMAND)
    torch.manual_seed(config.seed)  # fresh adapters, and rows of a vocabulary that grows
    loaded = load_model(config.model, config.lora)
    if not loaded.architecture.one_sequence:
        raise ModelError(
            f"--model {config.model.path} is an encoder-decoder model, and dpo (TRL) trains decoder-only ones."
        )
    if loaded.tokenizer.eos_token_id is None:
        raise ModelError(f"--model {config.model.path}: the tokenizer names no EOS token, so no answer could ever end.")
    check_adapted_head(loaded, config.lora, COMMAND)
    limit = length_limit(config, loaded)
    read: list[str] = []
    pairs = subset(read_preferences(config, loaded.tokenizer, notes=read), config.num_pairs, config.seed)
    encoder = TextEncoder(loaded.tokenizer)
    encoded, dropped = encode_all(pairs, lambda pair: _encode(pair, encoder, config), _length, config, limit)
    notes = [*loaded.notes, f"{len(encoded):,} pairs from {config.data.path}.", *read]
    notes += unending([pair[name] for pair in encoded for name in ("chosen_ids", "rejected_ids")], loaded.stop_ids)
    notes.append(dtype_note(config.save_dtype, loaded, "--save_dtype"))
    if dropped:
        notes.append(f"{dropped:,} pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop).")
    checkpoint = open_trainer_folder(config, COMMAND, notes)
    trainer = _Trainer(
        model=loaded.model,
        # With LoRA TRL switches the adapter off instead; without, it would read the start from its folder once more.
        ref_model=None if loaded.lora else copy.deepcopy(loaded.model),
        args=_arguments(config, loaded),
        train_dataset=Dataset.from_list(encoded),
        processing_class=loaded.tokenizer,
    )
    run_trainer(trainer, folder, checkpoint, notes, quiet=quiet)
    if trainer.is_world_process_zero():

        def texts(saved: Saved) -> dict[str, str]:
            loss = mean_of(trainer, "loss")
            return {
                "README.md": _card(config, len(encoded), trainer.state.global_step, loss, saved_facts(loaded, saved))
            }

        probe = AnswerProbe(loaded, [(pair["prompt_ids"], pair["chosen_ids"]) for pair in encoded[:TEXTS]])
        saved = save_trained(trainer, config, loaded, probe, texts)
        if not quiet:
            print(saved.sentence)
            accuracy = mean_of(trainer, "rewards/accuracies")
            say_done(trainer, folder, *([] if accuracy is None else [f"{accuracy:.0%} of the pairs ranked right"]))
    return folder


class _Trainer(OrderByEpoch, DPOTrainer):
    """TRL's trainer on pairs that are tokens already: its own encoding would differ from what a rollout sees."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _encode(pair: PreferencePair, encoder: TextEncoder, config: DpoConfig) -> dict[str, list[int]]:
    return {
        "prompt_ids": list(encode_prompt(pair.prompt, encoder).ids),
        "chosen_ids": encode_answer(pair.prompt, config.chosen_column, encoder, pair.where, flag="--chosen_column"),
        "rejected_ids": encode_answer(
            pair.prompt, config.rejected_column, encoder, pair.where, flag="--rejected_column"
        ),
    }


def _length(ids: dict[str, list[int]]) -> int:
    return len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))


def _arguments(config: DpoConfig, loaded: LoadedModel) -> TrlDpoConfig:
    with warnings.catch_warnings():
        # TRL's own default uses a name that transformers has renamed; the new one is unknown to older versions.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*checkpointing.*")
        return TrlDpoConfig(
            **trainer_arguments(config, loaded, learning_rate(config)),
            **BY_LENGTH,
            max_length=None,  # encode_all has seen to it
            disable_dropout=True,
            beta=config.beta,
            loss_type=[config.loss_type],
            label_smoothing=config.label_smoothing,
        )


def learning_rate(config: DpoConfig) -> float:
    """The peak learning rate: the one given, else TRL's recommendation."""
    if config.learning_rate is not None:
        return config.learning_rate
    return 1e-5 if config.lora.r > 0 else 1e-6


def _card(config: DpoConfig, pairs: int, steps: int, loss: float | None, saved: str) -> str:
    told = f" The mean training loss over the last steps was {loss:.3f}." if loss is not None else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [cagsr, dpo, trl]
---

# {Path(config.output_dir).name}

Direct preference optimisation from `{config.model.path}` with `cagsr dpo` {__version__} (TRL's DPOTrainer).

- Data: {pairs:,} preference pairs from `{config.data.path}`.
- {steps:,} steps of {config.batch_size} pairs, beta {config.beta:g}, peak learning rate {learning_rate(config):g}, seed
  {config.seed}.{told}
{saved}
- All settings: `{settings_file(COMMAND)}`.

## Limits

The model was not evaluated here: see `cagsr diagnose`.
"""
