"""What does coverage of an image's regions see of the facts said? Measured on the start's answers, before any training.

    python -m examples.images.seen --work runs/images --start runs/images/start-seed0 --output runs/images/seen.json

Prints, for layers and thresholds, the correlation with the facts that are said within the answers to one picture, as it is and
with length held fixed, and what it has to do with wrong and invented facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from cagsr.config import AttentionConfig, DataConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.diagnosis.best_of_n import correlation
from cagsr.diagnosis.cross_fit import held_fixed
from cagsr.evaluation.intervals import Floats
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.terms.image_coverage import weights_of
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import say, shown
from examples.images.empty import empty_coverage
from examples.images.facts import checked

ANSWERS = 8
THRESHOLDS = (0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Options:
    """Measure it."""

    work: Path
    """Folder that examples.images.write has written."""
    start: Path
    """The model whose answers are read."""
    output: Path
    """JSON file for the numbers."""
    prompts: int = 100
    """Pictures, with 8 answers each."""
    grid: int = 3
    """Regions of a side."""


def main(options: Options) -> None:
    """Measure, print and write."""
    signals, judged = measured(options)
    rows = table(signals, judged)
    for name, row in rows.items():
        say(f"{name:28}" + "  ".join(f"{measure} {value:+.2f}" for measure, value in row.items()))
    write_text_atomically(options.output, json.dumps(rows, indent=1) + "\n")


def measured(options: Options) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Coverage by layers and threshold, and what the checker says; ``(prompts, answers)`` each."""
    loaded = load_model(ModelConfig(path=str(options.start), device="cpu"), for_training=False)
    salience = SalienceConfig(image_grid=options.grid)
    sampling = SamplingConfig(num_generations=ANSWERS, max_new_tokens=48)
    data = DataConfig(path=str(options.work / "prompts.jsonl"), limit=options.prompts)
    room = loaded.room_for_prompts(sampling.max_new_tokens)
    prompts = prepare_prompts(data, salience, loaded.tokenizer, max_length=room, vision=loaded.vision).prompts
    # The layers of the text model alone, from the first.
    layers = ["all", *map(str, range(loaded.model.config.get_text_config().num_hidden_layers))]
    scorers = {
        name: AnswerScorer(loaded, RewardConfig(), AttentionConfig(layers=name), salience, every=False)
        for name in layers
    }
    found: dict[str, list[Floats]] = {}
    judged: dict[str, list[float]] = {}
    for some, rollout in sample_in_batches(loaded, prompts, sampling, 0, 16):
        found.setdefault("length", []).append(rollout.lengths.double().numpy())
        for name, scorer in scorers.items():
            batch = scorer.batch(rollout)
            assert batch.attention is not None
            assert batch.attention.regions is not None
            weights = weights_of(batch)
            words = batch.episodes.salience
            for tau in THRESHOLDS:
                looked = (batch.attention.regions, weights, rollout.sampled, tau)
                of_image = saturating_coverage(*looked)
                of_words = saturating_coverage(batch.attention.words, words, rollout.sampled, tau)
                for kind, values in (
                    ("things", of_image),
                    ("balance", torch.minimum(of_image, of_words)),
                    ("empty fields", empty_coverage(batch, tau)),
                ):
                    found.setdefault(f"{kind}, layers {name}, {tau}", []).append(values.double().numpy())
        rows = [prompt.prompt.columns["facts"] for prompt in some for _ in range(ANSWERS)]
        for one in checked([], rollout.completions, rows):
            for measure, value in one.items():
                judged.setdefault(measure, []).append(float(value or 0.0))
    shape = (-1, ANSWERS)
    return (
        {name: np.concatenate(parts).reshape(shape) for name, parts in found.items()},
        {name: np.array(values).reshape(shape) for name, values in judged.items()},
    )


def table(signals: Mapping[str, Floats], judged: Mapping[str, Floats]) -> dict[str, dict[str, float]]:
    """For each signal its mean and its correlations within the answers to one picture; ``|``: with length held fixed."""
    found = {}
    for name, values in signals.items():
        row = {"mean": float(values.mean())}
        for measure, truth in judged.items():
            row[measure] = correlation(values, truth)
            row[f"{measure}|"] = held_fixed(values, truth, signals["length"])
        found[name] = row
    return found


if __name__ == "__main__":
    with shown("examples.images.seen"):
        main(tyro.cli(Options, description=__doc__))
