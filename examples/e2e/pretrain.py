"""Supervised start from random weights: a plain loop with the settings found for a million parameters.

    python -m examples.e2e.pretrain --work runs/e2e --output runs/e2e/sft-seed0 --seed 0

Next-token cross-entropy on the completion only, AdamW, warm-up and cosine; answers that belong to the same number of
tokens share a batch, so that little is spent on padding.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from cagsr.models.continuation import encode_continuation
from cagsr.support.atomic import replace_folder
from examples.e2e.prepare import read_jsonl

IGNORED = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True)
class Options:
    """Train the start model."""

    work: Path = Path("runs/e2e")
    """Folder that ``prepare`` wrote."""
    data: Path | None = None
    """Rows to train on, ``prompt`` and ``completion``; None: the work folder's sft.jsonl."""
    output: Path = Path("runs/e2e/sft")
    """Folder for the trained model and its tokenizer."""
    seed: int = 0
    """Seeds the initial weights and the order of batches."""
    epochs: int = 4
    """Passes over the rows."""
    batch_size: int = 32
    """Rows per step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup_share: float = 0.05
    """Share of the steps with a rising learning rate."""
    weight_decay: float = 0.05
    """AdamW weight decay."""


def main(options: Options) -> None:
    """Train and save."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "init")
    config = AutoConfig.from_pretrained(options.work / "init")
    model = AutoModelForCausalLM.from_config(config)
    rows = encode(read_jsonl(options.data or options.work / "sft.jsonl"), tokenizer)
    start = time.perf_counter()
    loss = train(model, rows, tokenizer.pad_token_id, options)
    with replace_folder(options.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{options.output}: seed {options.seed}, loss {loss:.3f}, {time.perf_counter() - start:.0f} s")


def encode(rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Token ids of prompt + completion + <eos>, and how many of them are prompt."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        answer = encode_continuation(tokenizer, row["prompt"], row["completion"])
        encoded.append((prompt + answer + [tokenizer.eos_token_id], len(prompt)))
    return encoded


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and labels, each ``(batch, tokens)`` int64."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for number, (tokens, prompt) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, : len(tokens)] = 1
        labels[number, prompt : len(tokens)] = ids[number, prompt : len(tokens)]
    return ids, mask, labels


def train(model: Any, rows: list[tuple[list[int], int]], pad: int, options: Options) -> float:
    """Train in place; returns the mean loss (nats per completion token) of the last epoch."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=options.weight_decay, fused=True
    )
    per_epoch = math.ceil(len(rows) / options.batch_size)
    total = per_epoch * options.epochs
    warmup = max(1, int(options.warmup_share * total))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    mean = math.nan
    for _ in range(options.epochs):
        losses = []
        for batch in batches(rows, options.batch_size, generator):
            ids, mask, labels = collate(batch, pad)
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
            targets = labels[:, 1:]
            chosen = targets != IGNORED  # the head sees completion positions only
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"  loss {mean:.3f}", flush=True)
    model.eval()
    return mean


def batches(
    rows: list[tuple[list[int], int]], size: int, generator: torch.Generator
) -> list[list[tuple[list[int], int]]]:
    """Shuffled batches of rows of about the same length."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    chunks = []
    for start in range(0, len(order), 20 * size):  # sorted within a window: random enough, little padding
        window = sorted(order[start : start + 20 * size], key=lambda number: len(rows[number][0]))
        chunks += [[rows[number] for number in window[at : at + size]] for at in range(0, len(window), size)]
    return [chunks[number] for number in torch.randperm(len(chunks), generator=generator).tolist()]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
