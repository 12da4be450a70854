"""Supervised fine-tuning on TRL's SFTTrainer: the start for reinforcement learning, where there are pairs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from cagsr.config import ModelConfig, SftConfig
from cagsr.errors import ModelError
from cagsr.models.architecture import architecture_of
from cagsr.models.files import check_files
from cagsr.models.gguf import find_source
from cagsr.models.load import LoadedModel, load_model
from cagsr.pairs import IGNORED, encode_pairs, unending
from cagsr.runs.saved import TEXTS, answers_probe
from cagsr.runs.trainer_folder import settings_file
from cagsr.runs.trl_training import Outcome, Training, train_with_trl

COMMAND = "sft"
SETTINGS = settings_file(COMMAND)


def sft(config: SftConfig, *, quiet: bool = False) -> Path:
    """Fine-tune a decoder-only model on prompt-completion pairs and save it in Hugging Face layout.

    The loss is on the completions only, each ended by the end token (a conversation's by what its chat template ends the
    assistant's turn with); nothing is packed. With LoRA the saved model is the merged one and ``adapter/`` holds the adapter
    alone. The rest as ``train_with_trl``.
    """
    return train_with_trl(config, COMMAND, _load, _prepare, quiet=quiet)


def _prepare(config: SftConfig, loaded: LoadedModel, limit: int | None) -> Training:
    read: list[str] = []
    pairs, dropped = encode_pairs(config, loaded.tokenizer, limit, read)
    firsts = [(pair["input_ids"], sum(label == IGNORED for label in pair["labels"])) for pair in pairs[:TEXTS]]
    fact = (
        f"Data: {len(pairs):,} prompt-completion pairs from `{config.data.path}`; the loss is on the completions only."
    )
    return Training(
        trainer=partial(SFTTrainer, loaded.model),
        arguments=partial(
            SFTConfig,
            max_length=limit,
            packing=False,
            completion_only_loss=True,
            dataset_kwargs={"skip_prepare_dataset": True},  # encode_pairs has done it
        ),
        rows=pairs,
        dropped=dropped,
        notes=[*read, *unending([pair["input_ids"] for pair in pairs], loaded.stop_ids)],
        probe=answers_probe(loaded, [(ids[:prompt], ids[prompt:]) for ids, prompt in firsts]),
        describe=lambda trainer, saved: Outcome([fact]),
        what=f"Supervised fine-tuning from {'random weights' if config.from_scratch else f'`{config.model.path}`'}",
        trl="SFTTrainer",
        limits="The model imitates its training answers, their mistakes included. It was not evaluated here: see "
        "`cagsr diagnose`.",
        adapter=not config.from_scratch,  # an adapter on random weights is of no use without them
    )


def _load(config: SftConfig) -> LoadedModel:
    """Load the model, or make one with random weights."""
    if not config.from_scratch:
        return load_model(config.model, config.lora)
    with _random_weights(config.model, config.seed) as path:
        try:
            loaded = load_model(replace(config.model, path=path), config.lora)
        except ModelError as error:
            raise ModelError(str(error).replace(path, config.model.path)) from error
    return replace(loaded, notes=(*loaded.notes, f"Random weights from seed {config.seed} (--from_scratch)."))


@contextmanager
def _random_weights(config: ModelConfig, seed: int) -> Iterator[str]:
    """Yield a temporary folder with a random model of ``config``'s architecture and its tokenizer."""
    what = f"--model {config.path}"
    check_files(config.path, what, weights=False)
    source = find_source(config.path, what)
    options = {"trust_remote_code": config.trust_remote_code, **source.options}
    try:
        model_config = AutoConfig.from_pretrained(source.path, **options)
        tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{what}: --from_scratch needs a config.json and a tokenizer there ({reason})") from error
    torch.manual_seed(seed)
    if not architecture_of(model_config).one_sequence:
        raise ModelError(f"--model {config.path} is an encoder-decoder model, and sft (TRL) trains decoder-only ones.")
    model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="cagsr-scratch-") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        yield path
