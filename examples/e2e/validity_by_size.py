"""What each term sees of the facts said and added, for models of several sizes, and which layers and heads see it.

    python -m examples.e2e.validity_by_size --models small=runs/paper/start-seed0=runs/paper/unlabelled.jsonl \
        gemma=runs/pretrained/start-seed0=runs/pretrained/prompts.jsonl --output docs/figures/validity_by_size

Each model answers prompts of its own file ``--candidates`` times; the file's other prompts are what associations are learned
from. Terms are held against the slot checker within the answers to one prompt: facts said, the same with length held fixed, facts
added, length. Every head's coverage and grounded coverage are held against the facts said alone, and how often the head copies
(its hardest look is at the very token that is said) is counted without the checker. Writes ``OUTPUT.json``, ``.md`` and ``.svg``.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from cagsr.attention.probe import find_attention_layers
from cagsr.compare.result_figures import as_svg
from cagsr.config import (
    AssociationsConfig,
    AttentionConfig,
    DataConfig,
    ModelConfig,
    RewardConfig,
    SalienceConfig,
    SamplingConfig,
)
from cagsr.diagnosis.best_of_n import correlation
from cagsr.diagnosis.cross_fit import held_fixed
from cagsr.errors import ConfigError
from cagsr.flow import EpisodeBatch
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_associations import associations_of
from cagsr.reward.pooling import pool_pieces
from cagsr.reward.same_text import same_text
from cagsr.reward.terms.coverage import saturating_coverage
from cagsr.reward.terms.grounded_coverage import grounded_coverage
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import shown
from cagsr.view.measure import Plane, read_planes
from examples.e2e.rewards import report
from examples.e2e.signal_formulas import Floats, copying_rate
from examples.e2e.signal_table import Row, Truths, measure

TRUTHS = {"said": "facts said", "partial": "facts said, length held fixed", "added": "facts added", "length": "length"}
KINDS = ("coverage", "grounded_coverage")


@dataclass(frozen=True)
class Options:
    """Measure terms on models of several sizes."""

    models: tuple[str, ...]
    """LABEL=FOLDER=PROMPTS for each model; PROMPTS is JSONL, with more prompts than are measured where associations are learned."""
    output: Path = Path("runs/validity_by_size")
    """Files to write, without their endings."""
    prompts: int = 80
    """Prompts measured."""
    associations: int = 1024
    """Answers to the other prompts that associations are learned from; 0 leaves out the terms that need them."""
    candidates: int = 8
    """Answers to each prompt."""
    max_new_tokens: int = 80
    """Longest answer in tokens."""
    layers: str = "last-4"
    """Layers that the terms read, as ``attention.layers``."""
    batch_size: int = 8
    """Prompts at once."""
    seed: int = 0
    """Seeds the choice of prompts and the sampling."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model."""

    label: str
    parameters: int
    mean: dict[str, float]
    """Mean facts said, the best of the candidates' by an oracle, facts added."""
    terms: dict[str, dict[str, float]]
    """Term -> correlation with each of ``TRUTHS``, and the share of the oracle's best-of-n gain."""
    rows: dict[str, Row]
    """The same with intervals, but the partial correlation."""
    heads: list[dict[str, Any]]
    """For each head, and (head -1) the mean of a layer's: correlation of its coverages with facts said, and its copying."""


def main(options: Options) -> None:
    """Measure every model, and write what came of it after each, so that a stop loses one model."""
    found = []
    with shown("validity"):
        for model in options.models:
            began = time.perf_counter()
            found.append(measure_model(options, model))
            print(f"{found[-1].label}: {time.perf_counter() - began:.0f} s", flush=True)
            told = {"options": json.loads(json.dumps(dataclasses.asdict(options), default=str))}
            told["models"] = [dataclasses.asdict(one) for one in found]
            output = str(options.output)
            write_text_atomically(Path(f"{output}.json"), json.dumps(told, indent=1) + "\n")
            write_text_atomically(Path(f"{output}.md"), as_markdown(found) + "\n")
    write_text_atomically(Path(f"{options.output}.svg"), as_svg(heat_maps(found)))
    print(as_markdown(found))


def measure_model(options: Options, model: str) -> Measured:
    """Sample, read and judge one model's answers."""
    label, folder, path = parts_of(model)
    loaded = load_model(ModelConfig(path=folder), for_training=False)
    sampling = SamplingConfig(num_generations=options.candidates, max_new_tokens=options.max_new_tokens)
    room = loaded.room_for_prompts(options.max_new_tokens)
    prepared = prepare_prompts(DataConfig(path=path), SalienceConfig(), loaded.tokenizer, max_length=room)
    unique = list({one.prompt.text: one for one in prepared.prompts}.values())
    random.Random(options.seed).shuffle(unique)
    measured, other = unique[: options.prompts], unique[options.prompts :]
    associations = None
    if options.associations:
        if not other:
            raise ConfigError(f"{path}: all of its {len(unique)} prompts are measured; lower --prompts.")
        config = AssociationsConfig(answers=options.associations)
        associations = associations_of(loaded, other, sampling, config, seed=options.seed)
    scorer = AnswerScorer(
        loaded,
        RewardConfig(),
        AttentionConfig(layers=options.layers),
        SalienceConfig(),
        associations=associations,
        frequency=prepared.frequency,
        costly=True,
    )
    layers = find_attention_layers(loaded.model)
    planes = tuple(Plane(layer.number, head) for layer in layers.layers for head in range(layer.heads))
    signals: dict[str, list[Tensor]] = {}
    lengths: list[Tensor] = []
    said: list[dict[str, float]] = []
    copying = torch.zeros(len(planes), dtype=torch.float64)
    for some, episodes in sample_in_batches(loaded, measured, sampling, options.seed, options.batch_size):
        for name, values in scorer.values(scorer.batch(episodes)).items():
            signals.setdefault(name, []).append(values)
        lengths.append(episodes.sampled.sum(dim=1).cpu())
        read = read_planes(loaded, episodes, layers, planes)
        for plane, attention in with_layer_means(read).items():
            for kind, values in coverages(scorer, episodes, attention).items():
                signals.setdefault(f"{kind} {plane.layer} {plane.head}", []).append(values)
        copying += copying_of(scorer, episodes, [read[plane] for plane in planes]) * len(some) / len(measured)
        said += report([one.text for one in episodes.prompts.prompts], episodes.completions)
    shape = (len(measured), options.candidates)
    columns = {name: torch.cat(parts).double().numpy().reshape(shape) for name, parts in signals.items()}
    truths = Truths(
        1.0 - np.array([one["missed"] for one in said]).reshape(shape),
        np.array([one["added"] for one in said]).reshape(shape),
        torch.cat(lengths).double().numpy().reshape(shape),
    )
    terms = {name: columns[name] for name in scorer.weights if np.isfinite(columns[name]).all()}
    rows = measure([(terms, truths)])
    copies = dict(zip(planes, copying.tolist(), strict=True))
    heads = [
        {"layer": plane.layer, "head": plane.head if plane.head is not None else -1, "copying": copies.get(plane)}
        | {kind: correlation(columns[f"{kind} {plane.layer} {plane.head}"], truths.said) for kind in KINDS}
        for plane in [*planes, *(Plane(layer.number, None) for layer in layers.layers)]
    ]
    return Measured(
        label=label,
        parameters=loaded.model.num_parameters(),
        mean={
            "said": float(truths.said.mean()),
            "oracle": float(truths.said.max(axis=1).mean()),
            "added": float(truths.added.mean()),
        },
        terms={name: numbers_of(values, truths) | {"share": rows[name].share.mean} for name, values in terms.items()},
        rows=rows,
        heads=heads,
    )


def parts_of(model: str) -> tuple[str, str, str]:
    """Label, folder and file of prompts of one of ``--models``."""
    parts = model.split("=")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"--models {model}: write LABEL=FOLDER=PROMPTS.")
    return parts[0], parts[1], parts[2]


def numbers_of(values: Floats, truths: Truths) -> dict[str, float]:
    """A signal's correlations within prompts."""
    return {
        "said": correlation(values, truths.said),
        "partial": held_fixed(values, truths.said, truths.length),
        "added": correlation(values, truths.added),
        "length": correlation(values, truths.length),
    }


def with_layer_means(read: Mapping[Plane, Tensor]) -> dict[Plane, Tensor]:
    """The heads' attention, and that of each layer, the mean of its heads."""
    by_layer: dict[int | None, list[Tensor]] = {}
    for plane, attention in read.items():
        by_layer.setdefault(plane.layer, []).append(attention)
    return dict(read) | {Plane(layer, None): torch.stack(heads).mean(dim=0) for layer, heads in by_layer.items()}


def coverages(scorer: AnswerScorer, episodes: EpisodeBatch, attention: Tensor) -> dict[str, Tensor]:
    """Coverage and grounded coverage of a map ``(batch, response, prompt)``, ``(batch,)`` each."""
    words, salience, mask = episodes.words.cpu(), episodes.salience.cpu(), episodes.sampled.cpu()
    pooled = pool_pieces(attention, words, salience.shape[1], scorer.salience.pooling)
    same = same_text(scorer.loaded.texts, episodes).cpu()
    grounded = grounded_coverage(attention, same, words, salience, scorer.config.grounded_coverage.threshold)
    return {
        "coverage": saturating_coverage(pooled, salience, mask, scorer.config.coverage.threshold),
        "grounded_coverage": grounded,
    }


def copying_of(scorer: AnswerScorer, episodes: EpisodeBatch, heads: Sequence[Tensor]) -> Tensor:
    """How often each head's hardest look is at the token being said, ``(heads,)`` float64."""
    ids, prompts = scorer.loaded.texts.ids, episodes.prompts
    usable = prompts.real & (prompts.real.cumsum(dim=1) > 1)  # not the first token, the sink of attention
    said, asked = ids[episodes.ids].cpu(), ids[prompts.ids].cpu()
    return copying_rate(torch.stack(list(heads)), said, episodes.sampled.cpu(), asked, usable.cpu()).double()


def as_markdown(found: Sequence[Measured]) -> str:
    """One table for each truth: terms by models."""
    about = [
        f"{one.label}: {one.parameters:,} parameters; facts said {one.mean['said']:.3f}, best of the answers to a prompt "
        f"{one.mean['oracle']:.3f}, added {one.mean['added']:.3f}."
        for one in found
    ]
    names = list(dict.fromkeys(name for one in found for name in one.terms))
    blocks = ["\n".join(f"- {line}" for line in about)]
    for key, title in {**TRUTHS, "share": "share of the oracle's best-of-n gain"}.items():
        lines = [f"| {title} | " + " | ".join(one.label for one in found) + " |", "| --- |" + " --- |" * len(found)]
        for name in names:
            cells = [_cell(one, name, key) for one in found]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(one: Measured, name: str, key: str) -> str:
    if name not in one.terms:
        return ""
    if key == "partial":
        return f"{one.terms[name][key]:+.2f}"
    interval = getattr(one.rows[name], key)
    return format(interval, ".0%") if key == "share" else format(interval, "+.2f")


def heat_maps(found: Sequence[Measured]) -> Figure:
    """A row of maps for each model: layers by heads, the mean of a layer's heads at the right."""
    panels = {kind: f"{kind.replace('_', ' ')} and facts said" for kind in KINDS} | {"copying": "copying"}
    heights = [max(1.6, 0.22 * len({head["layer"] for head in one.heads})) for one in found]
    figure = Figure(figsize=(9, sum(heights) + 0.8 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, one in zip(axes, found, strict=True):
        layers = sorted({int(head["layer"]) for head in one.heads})
        width = 1 + max(int(head["head"]) for head in one.heads)
        for panel, (kind, title) in zip(row, panels.items(), strict=True):
            table = np.full((len(layers), width + 2), np.nan)
            for head in one.heads:
                if head[kind] is not None:
                    place = width + 1 if head["head"] < 0 else int(head["head"])
                    table[layers.index(int(head["layer"])), place] = head[kind]
            ours = kind != "copying"
            colours, least = ("RdBu", -0.8) if ours else ("Greens", 0.0)
            drawn = panel.imshow(table, cmap=colours, vmin=least, vmax=0.8, aspect="auto")
            figure.colorbar(drawn, ax=panel, shrink=0.8)
            places = [*range(width), *([width + 1] if ours else [])]
            panel.set_xticks(places, [*map(str, range(width)), *(["all"] if ours else [])], fontsize=7)
            panel.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
            panel.set_title(f"{one.label}: {title}", fontsize=8)
            panel.set_xlabel("head", fontsize=7)
            panel.set_ylabel("layer", fontsize=7)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
