"""Make the supervised start: a vision tower that sees what each field shows, then the careless annotator's captions.

    python -m examples.images.start --work runs/images --output runs/images/start-seed0 --seed 0

As in LLaVA the tower is trained first, by itself, and frozen while the rest learns the captions. CLIP's is trained on the
captions of millions of pictures; ours, in seconds, on what the fields of the captioned pictures show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from cagsr.support.atomic import replace_folder
from cagsr.support.progress import each, say, shown
from examples.images.facts import truth
from examples.images.model import reader, untrained
from examples.images.world import COLOURS, NUMBERS, PLACES, SHAPES

IGNORED = -100
SEEN = {"number": list(NUMBERS), "colour": list(COLOURS), "shape": list(SHAPES)}


@dataclass(frozen=True)
class Options:
    """Teach it."""

    work: Path
    """Folder that examples.images.write has written."""
    output: Path
    """Folder for the model."""
    seed: int = 0
    """Seeds the weights and the order of the pairs."""
    sight: int = 200
    """Steps that the vision tower is trained for."""
    epochs: int = 4
    """Times that each pair is read."""
    batch_size: int = 32
    """Pairs a step."""
    learning_rate: float = 2e-3
    """Highest learning rate; it rises over 5 % of the steps and falls to 0 as a cosine."""


def main(options: Options) -> None:
    """Teach and save."""
    from transformers import get_cosine_schedule_with_warmup

    processor = reader()
    model = untrained(processor, options.seed)
    rows = [json.loads(line) for line in (options.work / "pairs.jsonl").read_text().splitlines()]
    pairs = [encoded(processor, row, options.work) for row in rows]
    seen = train_tower(model.model.vision_tower, pairs, options)
    say(f"The vision tower names {seen:.1%} of what fields show.")
    model.model.vision_tower.requires_grad_(False)
    steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for epoch in range(options.epochs):
        order = torch.randperm(len(pairs)).split(options.batch_size)
        total = 0.0
        for chosen in each(f"epoch {epoch + 1}", order, "steps"):
            batch = padded([pairs[int(number)] for number in chosen], processor.tokenizer.pad_token_id)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        say(f"epoch {epoch + 1}: loss {total / len(order):.3f}")
    with replace_folder(options.output) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
    say(f"{options.output}: a model that has read {len(pairs):,} captions {options.epochs} times.")


def encoded(processor: Any, row: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """A row as token ids, labels on the caption alone, and pixels; the picture stands before the instruction."""
    asked = row["prompt"][0]["content"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with Image.open(folder / row["images"][0]) as image:
        read = processor(text=text, images=image, return_tensors="pt")
    caption = processor.tokenizer(row["completion"][0]["content"], return_tensors="pt").input_ids[0]
    end = torch.tensor([processor.tokenizer.eos_token_id])
    prompt = read["input_ids"][0]
    ids = torch.cat([prompt, caption, end])
    labels = torch.cat([torch.full_like(prompt, IGNORED), caption, end])
    return {"input_ids": ids, "labels": labels, "pixel_values": read["pixel_values"][0], "fields": fields(row["facts"])}


def fields(facts: Sequence[str]) -> Tensor:
    """``(fields, 4)`` int64: where each field is, and the number, colour and shape of what it shows, 0 for nothing."""
    found = torch.zeros(len(PLACES), 4, dtype=torch.int64)
    found[:, 0] = torch.arange(len(PLACES))
    for place, kind, value in truth(facts):
        found[PLACES.index(place), 1 + list(SEEN).index(kind)] = 1 + SEEN[kind].index(value)
    return found


def train_tower(tower: Any, pairs: Sequence[dict[str, Tensor]], options: Options) -> float:
    """Teach the vision tower, by linear heads on its last hidden states, what each field is and shows.

    Returns the share of those properties that it names right in the last batches.
    """
    sizes = [len(PLACES), *(1 + len(values) for values in SEEN.values())]
    heads = torch.nn.Linear(tower.config.hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=options.learning_rate)
    right: list[float] = []
    for step in each("teaching the vision tower", range(options.sight), "steps"):
        some = [pairs[number] for number in torch.randint(len(pairs), (options.batch_size,)).tolist()]
        asked = torch.stack([one["fields"] for one in some])
        states = tower(torch.stack([one["pixel_values"] for one in some])).last_hidden_state
        logits = heads(states).split(sizes, dim=-1)
        loss = torch.stack(
            [cross_entropy(one.flatten(0, 1), asked[..., kind].flatten()) for kind, one in enumerate(logits)]
        ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= options.sight - 20:
            guessed = torch.stack([one.argmax(dim=-1) for one in logits], dim=-1)
            right.append(float((guessed == asked).float().mean()))
    return sum(right) / max(1, len(right))


def padded(pairs: list[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Pairs as one batch, padded on the right."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([pair["input_ids"] for pair in pairs], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(pair["input_ids"]) for pair in pairs])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1])[None] < lengths[:, None]).long(),
        "labels": pad_sequence([pair["labels"] for pair in pairs], batch_first=True, padding_value=IGNORED),
        "pixel_values": torch.stack([pair["pixel_values"] for pair in pairs]),
    }


if __name__ == "__main__":
    with shown("examples.images.start"):
        main(tyro.cli(Options, description=__doc__))
