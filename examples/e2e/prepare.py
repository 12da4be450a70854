"""Make everything the example needs: the data files, a tokenizer and an untrained model of about a million parameters.

    python -m examples.e2e.prepare --work runs/e2e

writes ``sft.jsonl`` (prompt, completion), ``unlabelled.jsonl`` and ``held_out.jsonl`` (prompts without any reference, for
training and for watching it), ``test.jsonl`` (prompt, references) and ``init/`` (random weights and a tokenizer).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cagsr.errors import DataError
from examples.e2e.augment import vary
from examples.e2e.facts import as_prompt, invent, parse, take_inventory

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "e2e"
HUB_ID = "GEM/e2e_nlg"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Prepare the E2E NLG example."""

    work: Path = Path("runs/e2e")
    """Folder to write into."""
    data: Path = SHARED
    """Folder with train.jsonl and test.jsonl; where it is absent the Hub's GEM/e2e_nlg is read."""
    unlabelled: int = 4000
    """New meaning representations to train on."""
    held_out: int = 300
    """New meaning representations that are never trained on."""
    flatten: float = 0.5
    """Exponent of the value counts when values are drawn: 1 as often as in the data, 0 all alike."""
    new_names: float = 0.5
    """Share of made-up names and landmarks in the new meaning representations."""
    variants: int = 2
    """Varied copies of each training pair: other names and values, in prompt and sentence alike; 0 for none."""
    vocab_size: int = 1024
    """Tokens of the tokenizer."""
    layers: int = 4
    """Layers of the model."""
    hidden_size: int = 128
    """Width of the model."""
    heads: int = 4
    """Attention heads of a layer."""
    rows: int | None = None
    """Use only the first rows of each file (for a quick look)."""
    seed: int = 0
    """Seeds the invented prompts and the initial weights."""


def main(options: Options) -> None:
    """Write the data files and ``init/``."""
    train, test = load_rows(options.data)
    counts = prepare_data(options, train[: options.rows], test[: options.rows])
    # The tokenizer learns from people's sentences, not from made-up names: those come after them in the file.
    written = read_jsonl(options.work / "sft.jsonl")[: len(train[: options.rows])]
    texts = [row["prompt"] + row["completion"] for row in written]
    parameters = make_model(options, texts, options.work / "init")
    print(f"{options.work}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"{options.work / 'init'}: {parameters:,} parameters, untrained")


def prepare_data(options: Options, train: Rows, test: Rows) -> dict[str, int]:
    """Write the four data files; returns the number of rows of each. Raises DataError where training meets test."""
    train_facts = [parse(row["prompt"]) for row in train]
    test_facts = [parse(row["prompt"]) for row in test]
    overlap = {frozenset(facts) for facts in train_facts} & {frozenset(facts) for facts in test_facts}
    if overlap:
        raise DataError(f"{options.data}: {len(overlap)} prompts of test are also in train; use disjoint files.")
    inventory = take_inventory(dict.fromkeys(train_facts))
    total = options.unlabelled + options.held_out
    new = [
        {"prompt": as_prompt(facts)}
        for facts in invent(
            inventory, total, [*train_facts, *test_facts], options.seed, options.flatten, options.new_names
        )
    ]
    pairs = [(facts, tidy(row["completion"])) for facts, row in zip(train_facts, train, strict=True)]
    generator = random.Random(options.seed)
    copies = (vary(facts, text, inventory, generator) for _ in range(options.variants) for facts, text in pairs)
    reserved = {frozenset(parse(row["prompt"])) for row in new} | {frozenset(facts) for facts in test_facts}
    pairs += [copy for copy in copies if copy is not None and frozenset(copy[0]) not in reserved]
    files: dict[str, Rows] = {
        "sft": [{"prompt": as_prompt(facts), "completion": " " + text} for facts, text in pairs],
        "unlabelled": new[options.held_out :],
        "held_out": new[: options.held_out],
        "test": [
            {"prompt": as_prompt(facts), "references": [tidy(text) for text in row["references"]]}
            for facts, row in zip(test_facts, test, strict=True)
        ],
    }
    prompts = {name: {frozenset(parse(row["prompt"])) for row in rows} for name, rows in files.items()}
    names = list(files)
    for position, one in enumerate(names):
        for other in names[position + 1 :]:
            assert not prompts[one] & prompts[other], f"{one} and {other} share prompts"
    for name, rows in files.items():
        write_jsonl(options.work / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}


def tidy(text: str) -> str:
    """Single spaces only, none at the ends."""
    return " ".join(text.split())


def load_rows(folder: Path) -> tuple[Rows, Rows]:
    """Training and test rows from ``folder``, else from the Hub. Raises DataError where neither is there."""
    if folder.is_dir():
        return read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "test.jsonl")
    from datasets import load_dataset

    try:
        # The Hub's own conversion: datasets 4 and later don't run the loading script of the main branch.
        hub = load_dataset(HUB_ID, revision="refs/convert/parquet")
    except Exception as error:  # datasets, its client and the network raise many kinds; the cause stays attached
        raise DataError(
            f"{folder} is absent and {HUB_ID} can't be read from the Hub ({error}); give --data a folder with "
            "train.jsonl (prompt, completion) and test.jsonl (prompt, references)."
        ) from error
    # The Hub's validation split is what this example trains on: the set train.jsonl was made from.
    train = [{"prompt": row["meaning_representation"], "completion": row["target"]} for row in hub["validation"]]
    known = {frozenset(parse(row["prompt"])) for row in train}
    references: dict[str, list[str]] = {}
    for row in hub["test"]:
        texts = row["references"] or [row["target"]]
        if frozenset(parse(row["meaning_representation"])) not in known:
            references.setdefault(row["meaning_representation"], []).extend(texts)
    return train, [{"prompt": prompt, "references": texts} for prompt, texts in references.items()]


def read_jsonl(path: Path) -> Rows:
    """Rows of a JSONL file. Raises DataError naming the file and line that can't be read."""
    rows: Rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); give --data a folder that holds it.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove the line.") from error
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def make_model(options: Options, texts: list[str], folder: Path) -> int:
    """Save a tokenizer learnt on ``texts`` and a random Llama-style decoder; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, options.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with three distinct special tokens, which puts <bos> first and loses no character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
