"""Make the supervised start: an encoder that hears which word sounds when, then the careless transcriber's transcripts.

    python -m examples.audio.start --work runs/audio --output runs/audio/start-seed0 --seed 0

Published Whispers have heard hundreds of thousands of hours. The encoder of this one is taught by itself first, in a minute, on
which word sounds at each of its states, and frozen while the decoder learns the transcripts.
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
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cagsr.flow import Sound
from cagsr.models.sounds import open_sound
from cagsr.support.atomic import replace_folder
from cagsr.support.progress import each, say, shown
from examples.audio.model import OPENING, extractor, tokenizer, untrained
from examples.audio.world import NAMES, RATE, SECONDS

IGNORED = -100


@dataclass(frozen=True)
class Options:
    """Teach it."""

    work: Path
    """Folder that examples.audio.write has written."""
    output: Path
    """Folder for the model."""
    seed: int = 0
    """Seeds the weights and the order of the pairs."""
    hearing: int = 500
    """Steps that the encoder is trained for."""
    epochs: int = 8
    """Times that each pair is read."""
    batch_size: int = 32
    """Pairs a step."""
    learning_rate: float = 2e-3
    """Highest learning rate; it rises over 5 % of the steps and falls to 0 as a cosine."""


def main(options: Options) -> None:
    """Teach and save."""
    from transformers import get_cosine_schedule_with_warmup

    words, features = tokenizer(), extractor()
    model = untrained(words, options.seed)
    rows = [json.loads(line) for line in (options.work / "pairs.jsonl").read_text().splitlines()]
    pairs = [encoded(words, features, row, options.work) for row in each("reading the clips", rows, "clips")]
    heard = train_encoder(model, pairs, options)
    say(f"The encoder names {heard:.1%} of what sounds at its states.")
    encoder = model.get_encoder()
    encoder.requires_grad_(False)
    with torch.no_grad():
        states = [encoder(one["input_features"][None]).last_hidden_state[0] for one in each("hearing", pairs, "clips")]
    steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for epoch in range(options.epochs):
        order = torch.randperm(len(pairs)).split(options.batch_size)
        total = 0.0
        for chosen in each(f"epoch {epoch + 1}", order, "steps"):
            loss = _loss(
                model,
                [pairs[int(n)] for n in chosen],
                torch.stack([states[int(n)] for n in chosen]),
                words.pad_token_id,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        say(f"epoch {epoch + 1}: loss {total / len(order):.3f}")
    encoder.requires_grad_(True)
    encoder.embed_positions.requires_grad_(False)  # as Whisper has them
    with replace_folder(options.output) as new:
        model.save_pretrained(new)
        words.save_pretrained(new)
        features.save_pretrained(new)
    say(f"{options.output}: a model that has read {len(pairs):,} transcripts {options.epochs} times.")


def encoded(words: Any, features: Any, row: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """A row as the decoder's input, what it is to say, features, and which word sounds at each encoder state."""
    samples = open_sound(Sound(str(folder / row["audio"]), row["audio"]), RATE)
    opening = words.convert_tokens_to_ids(list(OPENING))
    said = words(row["completion"], add_special_tokens=False).input_ids
    return {
        "ids": torch.tensor([*opening, *said]),
        "labels": torch.tensor([IGNORED] * (len(opening) - 1) + [*said, words.eos_token_id]),
        "input_features": features(samples, sampling_rate=RATE, return_tensors="pt")["input_features"][0],
        "sounding": sounding(row["words"]),
    }


def sounding(words: Sequence[tuple[str, float, float]]) -> Tensor:
    """``(states,)`` int64: the word, from 1, that sounds at each state, 0 for none."""
    times = torch.arange(round(50 * SECONDS)) / 50
    found = torch.zeros(len(times), dtype=torch.int64)
    for name, start, end in words:
        found[(times >= start) & (times < end)] = 1 + NAMES.index(name)
    return found


def train_encoder(model: Any, pairs: Sequence[dict[str, Tensor]], options: Options) -> float:
    """Teach the encoder, by a linear head on its states, which word sounds at each; the share named right in the last batches."""
    encoder = model.get_encoder()
    head = torch.nn.Linear(model.config.d_model, 1 + len(NAMES))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=options.learning_rate)
    right: list[float] = []
    for step in each("teaching the encoder", range(options.hearing), "steps"):
        some = [pairs[number] for number in torch.randint(len(pairs), (options.batch_size,)).tolist()]
        asked = torch.stack([one["sounding"] for one in some])
        logits = head(encoder(torch.stack([one["input_features"] for one in some])).last_hidden_state)
        loss = cross_entropy(logits.flatten(0, 1), asked.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= options.hearing - 20:
            right.append(float((logits.argmax(dim=-1) == asked).float().mean()))
    return sum(right) / max(1, len(right))


def _loss(model: Any, pairs: Sequence[dict[str, Tensor]], states: Tensor, pad: int) -> Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    ids = pad_sequence([pair["ids"] for pair in pairs], batch_first=True, padding_value=pad)
    labels = pad_sequence([pair["labels"] for pair in pairs], batch_first=True, padding_value=IGNORED)
    logits = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=ids).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


if __name__ == "__main__":
    with shown("examples.audio.start"):
        main(tyro.cli(Options, description=__doc__))
