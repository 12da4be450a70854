"""Supervised fine-tuning on pairs: the start for reinforcement learning. Decoder-only models by TRL's SFTTrainer,
encoder-decoders by transformers' Seq2SeqTrainer.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import SFTConfig, SFTTrainer

from cagsr.config import ModelConfig, SftConfig
from cagsr.errors import ModelError
from cagsr.flow import ImageInputs
from cagsr.models.architecture import architecture_of
from cagsr.models.files import check_files, copy_beside
from cagsr.models.generation import decoder_prefix
from cagsr.models.gguf import find_source
from cagsr.models.image_arguments import ImageArguments
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.vision import PROCESSOR_FILES, Vision
from cagsr.pairs import IGNORED, Pair, encode_pairs, unending
from cagsr.runs.saved import TEXTS, answers_probe
from cagsr.runs.trainer_folder import settings_file
from cagsr.runs.trl_training import Outcome, Training, train_with_trl

COMMAND = "sft"
SETTINGS = settings_file(COMMAND)


def sft(config: SftConfig, *, quiet: bool = False) -> Path:
    """Fine-tune a model on prompt-completion pairs and save it in Hugging Face layout.

    The loss is on the completions only, each ended by the end token (a conversation's by what its chat template ends the
    assistant's turn with); nothing is packed. An encoder-decoder's encoder reads the prompt, its decoder says the completion.
    With LoRA the saved model is the merged one and ``adapter/`` holds the adapter alone. The rest as ``train_with_trl``.
    """
    return train_with_trl(config, COMMAND, _load, _prepare, quiet=quiet)


def _prepare(config: SftConfig, loaded: LoadedModel, limit: int | None) -> Training:
    read: list[str] = []
    if limit is not None:
        limit -= len(loaded.generation.forced)  # which the decoder has positions for too
    vision = loaded.vision if isinstance(loaded.vision, Vision) else None  # one that hears has been refused
    pairs, dropped = encode_pairs(config, loaded.tokenizer, limit, read, loaded.architecture, vision)
    fact = (
        f"Data: {len(pairs):,} prompt-completion pairs from `{config.data.path}`; the loss is on the completions only."
    )
    make = _one_sequence if loaded.architecture.one_sequence else _two_sequences
    if any(pair.seen for pair in pairs):
        make = _with_images
    some = pairs[:TEXTS]
    trainer, arguments, rows = make(loaded, pairs, limit)
    return Training(
        trainer=trainer,
        arguments=arguments,
        rows=rows,
        dropped=dropped,
        notes=[*read, *unending([pair.answer for pair in pairs], loaded.stop_ids)],
        probe=answers_probe(
            loaded,
            [(pair.prompt, pair.answer) for pair in some],
            [_images(pair, loaded, loaded.device) for pair in some],
        ),
        describe=lambda trainer, saved: Outcome([fact]),
        what=f"Supervised fine-tuning from {'random weights' if config.from_scratch else f'`{config.model.path}`'}",
        library="TRL's SFTTrainer" if loaded.architecture.one_sequence else "transformers' Seq2SeqTrainer",
        task=loaded.architecture.pipeline_tag,
        limits="The model imitates its training answers, their mistakes included. It was not evaluated here: see "
        "`cagsr diagnose`.",
        adapter=not config.from_scratch,  # an adapter on random weights is of no use without them
    )


_Made = tuple[partial[Any], partial[Any], Sequence[Mapping[str, Any]]]
"""What makes a trainer and its arguments, and the rows that it trains on."""


def _one_sequence(loaded: LoadedModel, pairs: Sequence[Pair], limit: int | None) -> _Made:
    arguments = partial(
        SFTConfig,
        max_length=limit,
        packing=False,
        completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True},  # encode_pairs has done it
    )
    return partial(SFTTrainer, loaded.model), arguments, [pair.one_sequence() for pair in pairs]


def _with_images(loaded: LoadedModel, pairs: Sequence[Pair], limit: int | None) -> _Made:
    trainer, arguments, _ = _one_sequence(loaded, pairs, limit)
    return (
        partial(trainer, data_collator=partial(_collate_with_images, pairs=pairs, loaded=loaded)),
        # Not every batch reaches all that reads images, and some models leave a part of it out (LLaVA's last layers).
        partial(arguments, remove_unused_columns=False, ddp_find_unused_parameters=True),
        [{"pair": number} for number in range(len(pairs))],
    )


def _images(pair: Pair, loaded: LoadedModel, device: torch.device) -> ImageInputs | None:
    return None if pair.seen is None or loaded.vision is None else loaded.vision.inputs(pair.seen, device)


def _collate_with_images(
    rows: Sequence[Mapping[str, int]], pairs: Sequence[Pair], loaded: LoadedModel
) -> dict[str, Tensor]:
    """Pad the pairs of a batch on the right, and read their images: anew for each batch, and not all are held as pixels."""
    chosen = [pairs[row["pair"]] for row in rows]
    batch = _padded([pair.one_sequence() for pair in chosen], {"input_ids": loaded.pad_token_id, "labels": IGNORED})
    images = [_images(pair, loaded, torch.device("cpu")) for pair in chosen]
    if not any(images):
        return batch
    real, answers = batch["attention_mask"].bool(), batch["labels"] != IGNORED
    seen = ImageArguments.of(loaded.model, images, batch["input_ids"], real, answers)
    return {**batch, **seen.of_forward(with_images=True)}


def _two_sequences(loaded: LoadedModel, pairs: Sequence[Pair], limit: int | None) -> _Made:
    # Read here: while it trains the model has another generation config.
    prefix = list(decoder_prefix(loaded.model))
    trainer = partial(
        Seq2SeqTrainer,
        loaded.model,
        data_collator=partial(_collate, pad=loaded.pad_token_id),
        compute_loss_func=_mean_of_tokens,
    )
    rows = [
        {
            "input_ids": prompt,
            # As a rollout's decoder reads them; by themselves these models would shift the labels, mBART in a way of its own.
            "decoder_input_ids": prefix + answer[:-1],
            "labels": [IGNORED] * (len(prefix) - 1) + answer,
        }
        for prompt, answer, _ in pairs
    ]
    return trainer, partial(Seq2SeqTrainingArguments, remove_unused_columns=False), rows


def _collate(rows: Sequence[Mapping[str, Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """Pad a batch on the right; labels with ``IGNORED``."""
    return _padded(rows, {"input_ids": pad, "decoder_input_ids": pad, "labels": IGNORED})


def _padded(rows: Sequence[Mapping[str, Sequence[int]]], fillings: Mapping[str, int]) -> dict[str, Tensor]:
    """The columns of ``fillings`` as tensors ``(rows, longest)`` padded on the right with those, and the mask of ``input_ids``."""
    found = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=filling)
        for name, filling in fillings.items()
    }
    real = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    return {**found, "attention_mask": pad_sequence(real, batch_first=True)}


def _mean_of_tokens(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The mean over all learnt tokens of a step, whatever its micro-batches: T5 and BART would take each one's own."""
    logits = outputs["logits"].float()
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())


def _load(config: SftConfig) -> LoadedModel:
    """Load the model, or make one with random weights."""
    if not config.from_scratch:
        return load_model(config.model, config.lora)
    with _random_weights(config.model, config.seed) as path:
        try:
            loaded = load_model(replace(config.model, path=path), config.lora)
        except ModelError as error:
            raise ModelError(str(error).replace(path, config.model.path)) from error
    told = f"Random weights from seed {config.seed} (--from_scratch)."
    vision = None if loaded.vision is None else replace(loaded.vision, path=config.model.path)
    return replace(loaded, path=config.model.path, vision=vision, notes=(*loaded.notes, told))


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
    model = architecture_of(model_config).auto_class.from_config(
        model_config, trust_remote_code=config.trust_remote_code
    )
    with tempfile.TemporaryDirectory(prefix="cagsr-scratch-") as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        copy_beside(source.path, PROCESSOR_FILES, Path(path))
        yield path
