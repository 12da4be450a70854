"""What else sees facts without a label: heads calibrated, lookback without length, doubtful words, agreeing answers, sums.

    python -m examples.e2e.signals --work runs/paper

For each start model below ``work`` (``start-seed0``, ...) it takes three sets of different prompts from ``unlabelled.jsonl``: to
learn associations from, to calibrate on (both without labels), and to measure on. Each signal is set against the slot
checker within the answers to one prompt. The checker takes part in no signal but those that say so ("by label": upper
bounds). All signals are turned so that more is better. What came of it: docs/signals.md.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

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
from cagsr.diagnosis.recommend import within_z
from cagsr.errors import ConfigError
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_associations import associations_of
from cagsr.support.atomic import write_text_atomically
from examples.e2e.rewards import report
from examples.e2e.signal_answers import (
    Answers,
    Calibration,
    best_weights,
    calibrate,
    lookback,
    mixed,
    read_answers,
    values_of_heads,
    weighted_heads,
)
from examples.e2e.signal_formulas import Floats, head_weights, probe_weights, sibling_support, word_doubts
from examples.e2e.signal_table import Truths, as_markdown, difference, differences_as_markdown, measure

BY_LABEL = "by label"
"""In the name of what the checker helped to make: an upper bound, no signal."""
SUMS: tuple[tuple[tuple[float, str], ...], ...] = (
    ((1.0, "grounded_coverage"), (1.0, "self_certainty")),
    ((1.0, "grounded, heads by copying"), (1.0, "self_certainty")),
    ((1.0, "grounded, heads by copying"), (1.0, "self_certainty"), (1.0, "- words not copied")),
    ((1.0, "siblings say it too"), (1.0, "says what siblings say")),
    ((1.0, "associated_coverage"), (0.5, "grounded_coverage")),
    ((1.0, "associated_coverage"), (0.5, "grounded, heads by copying")),
    ((1.0, "associated_coverage"), (0.5, "self_certainty")),
    ((1.0, "associated_coverage"), (0.5, "siblings say it too")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported")),
    ((1.0, "associated_coverage"), (1.0, "- unsupported")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported"), (0.5, "grounded, heads by copying")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported"), (0.5, "self_certainty")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported"), (0.5, "lookback, heads by probe")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported"), (0.5, "- surprise, mean")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported"), (0.5, "- words not copied")),
    ((1.0, "associated_coverage"), (0.5, "- unsupported"), (0.5, "siblings say it too")),
)
"""Weights and signals of the sums of z-scores within a prompt that were tried; all of them are reported."""
BOTH = "sum: associated_coverage - 0.5 unsupported"
PAIRS = (
    ("coverage, heads by copying", "coverage"),
    ("coverage, heads by agreement", "coverage"),
    ("grounded, heads by copying", "grounded_coverage"),
    ("grounded, heads by agreement", "grounded_coverage"),
    ("- words not copied", "- words not in the prompt"),
    ("sum: grounded, heads by copying + self_certainty", "sum: grounded_coverage + self_certainty"),
    (BOTH, "associated_coverage"),
    ("sum: associated_coverage - unsupported", BOTH),
    (f"{BOTH} + 0.5 grounded, heads by copying", BOTH),
    (f"{BOTH} + 0.5 self_certainty", BOTH),
    (f"{BOTH} + 0.5 lookback, heads by probe", BOTH),
    (f"{BOTH} - 0.5 surprise, mean", BOTH),
    (f"{BOTH} - 0.5 words not copied", BOTH),
    (f"{BOTH} + 0.5 siblings say it too", BOTH),
    (f"all signals, fitted to said less added {BY_LABEL}", BOTH),
)
"""Signals that are compared with each other, paired."""


@dataclass(frozen=True)
class Options:
    """Measure signals that need no label against the slot checker."""

    work: Path = Path("runs/paper")
    """Folder with unlabelled.jsonl and the start models."""
    starts: tuple[str, ...] = ("start-seed0", "start-seed1", "start-seed2")
    """Start models, folders below work."""
    output: Path | None = None
    """JSON file for all numbers; None: signals.json in the work folder."""
    prompts: int = 96
    """Prompts measured."""
    calibration: int = 96
    """Other prompts that heads and lookback are calibrated on, without labels."""
    associations: int = 1024
    """Still other prompts that the associations are learned from."""
    candidates: int = 8
    """Answers to each prompt."""
    max_new_tokens: int = 80
    """Longest answer in tokens."""
    batch_size: int = 8
    """Prompts at once."""
    common: float = 0.25
    """Words that more than this share of the calibration answers say are no content words."""
    seed: int = 0
    """Seeds the choice of prompts and the sampling."""


def main(options: Options) -> None:
    """Measure every start model, print the table and write all numbers."""
    found, planes = [], []
    for name in options.starts:
        began = time.perf_counter()
        signals, truths, heads = measure_start(options, options.work / name)
        found.append((signals, truths))
        planes.append(heads)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = measure(found)
    differences = {(first, second): difference(found, first, second) for first, second in PAIRS}
    truth = [one for _, one in found]
    numbers = {
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "said": float(np.mean([one.said for one in truth])),
        "added": float(np.mean([one.added for one in truth])),
        "oracle": float(np.mean([one.said.max(axis=1).mean() for one in truth])),
        "signals": {name: dataclasses.asdict(row) for name, row in rows.items()},
        "differences": [
            {"signal": first, "less": second, **dataclasses.asdict(row)} for (first, second), row in differences.items()
        ],
        "heads": dict(zip(options.starts, planes, strict=True)),
    }
    output = options.output or options.work / "signals.json"
    write_text_atomically(output, json.dumps(numbers, indent=1) + "\n")
    print(as_markdown(rows) + "\n\n" + differences_as_markdown(differences))
    print(
        f"facts said {numbers['said']:.3f}, best of {options.candidates} {numbers['oracle']:.3f}; all numbers: {output}"
    )


def measure_start(options: Options, path: Path) -> tuple[dict[str, Floats], Truths, dict[str, list[float]]]:
    """Sample and read one model; every signal, what the checker says, and what was learned of each head."""
    loaded = load_model(ModelConfig(path=str(path)), for_training=False)
    sampling = SamplingConfig(num_generations=options.candidates, max_new_tokens=options.max_new_tokens)
    reward, salience = RewardConfig(), SalienceConfig()
    data = DataConfig(path=str(options.work / "unlabelled.jsonl"))
    prepared = prepare_prompts(
        data, salience, loaded.tokenizer, max_length=loaded.room_for_prompts(options.max_new_tokens)
    )
    unique = list({one.prompt.text: one for one in prepared.prompts}.values())
    sizes = (options.prompts, options.calibration, options.associations)
    if sum(sizes) > len(unique):
        raise ConfigError(
            f"{data.path} has {len(unique)} different prompts and {sum(sizes)} are needed: lower --associations."
        )
    drawn = random.Random(options.seed).sample(unique, sum(sizes))
    measured, other, learned = drawn[: sizes[0]], drawn[sizes[0] : sizes[0] + sizes[1]], drawn[-sizes[2] :]
    config = AssociationsConfig(answers=options.associations)
    associations = associations_of(loaded, learned, sampling, config, seed=options.seed)
    scorer = AnswerScorer(loaded, reward, AttentionConfig(layers="all"), salience, associations=associations)
    answers = read_answers(loaded, measured, sampling, scorer, options.seed, options.batch_size)
    calibrating = read_answers(loaded, other, sampling, scorer, options.seed + 1, options.batch_size)
    learned_of = calibrate(calibrating, scorer, options.max_new_tokens, options.common)
    truths = judge(answers)
    heads = {
        "layer": [float(plane.layer or 0) for plane in answers.planes],
        "head": [float(plane.head or 0) for plane in answers.planes],
        "copying": learned_of.copying.tolist(),
        "coverage agreement": learned_of.coverage_agreement.tolist(),
        "grounded agreement": learned_of.grounded_agreement.tolist(),
    }
    signals = signals_of(answers, learned_of, scorer, truths)
    known = judge(calibrating)
    signals |= fitted_by_label(signals, signals_of(calibrating, learned_of, scorer, known), known)
    return signals, truths, heads


def judge(answers: Answers) -> Truths:
    """What the slot checker says of the answers."""
    prompts = [one.prompt.text for one in answers.prompts for _ in range(answers.candidates)]
    judged = report(prompts, [text for texts in answers.texts() for text in texts])
    shape = (len(answers.prompts), answers.candidates)
    said = 1.0 - np.array([one["missed"] for one in judged]).reshape(shape)
    added = np.array([one["added"] for one in judged]).reshape(shape)
    return Truths(said, added, answers.terms["length"])


def signals_of(answers: Answers, learned: Calibration, scorer: AnswerScorer, truths: Truths) -> dict[str, Floats]:
    """Every signal of the answers, ``(prompts, candidates)`` each, more is better."""
    found = {
        name: answers.terms[name]
        for name in ("associated_coverage", "coverage", "grounded_coverage", "self_certainty", "length")
    }
    found["- unsupported"] = -answers.terms["unsupported"]
    found |= head_signals(answers, learned, scorer, truths)
    found |= lookback_signals(answers, learned)
    found |= doubt_signals(answers, learned, scorer)
    found |= sibling_signals(answers, learned)
    for parts in SUMS:
        found[sum_name(parts)] = np.sum([weight * within_z(found[part]) for weight, part in parts], axis=0)
    return found


def sum_name(parts: tuple[tuple[float, str], ...]) -> str:
    """A sum as text: ``sum: associated_coverage - 0.5 unsupported``."""
    text = "sum:"
    for number, (weight, part) in enumerate(parts):
        sign = "-" if part.startswith("- ") else "" if number == 0 else "+"
        text += f" {sign} " if sign else " "
        text += ("" if weight == 1 else f"{weight:g} ") + part.removeprefix("- ")
    return text


def fitted_by_label(signals: Mapping[str, Floats], other: Mapping[str, Floats], known: Truths) -> dict[str, Floats]:
    """The weighted sum of all signals that predicts the checker best on other prompts: what any sum of them could reach."""
    names = [name for name in signals if BY_LABEL not in name and not name.startswith("sum: ")]
    found = {}
    for label, truth in (("facts said", known.said), ("said less added", known.net)):
        weights = probe_weights(np.stack([other[name] for name in names]), truth)
        found[f"all signals, fitted to {label} {BY_LABEL}"] = np.tensordot(
            weights, np.stack([signals[name] for name in names]), axes=1
        )
    return found


def head_signals(answers: Answers, learned: Calibration, scorer: AnswerScorer, truths: Truths) -> dict[str, Floats]:
    """Coverage and grounded coverage from heads weighed without a label, and from the best head by label."""
    found = {}
    for kind, short, agreement in (
        ("coverage", "coverage", learned.coverage_agreement),
        ("grounded_coverage", "grounded", learned.grounded_agreement),
    ):
        alone = values_of_heads(answers, scorer, kind)
        for name, weights in (
            ("heads by copying", head_weights(learned.copying)),
            ("best copying head", best_weights(learned.copying)),
            ("heads by agreement", head_weights(agreement)),
            ("best agreeing head", best_weights(agreement)),
        ):
            found[f"{short}, {name}"] = weighted_heads(answers, scorer, kind, weights)
        best = int(np.argmax([correlation(values, truths.said) for values in alone]))
        found[f"{short}, best head {BY_LABEL}"] = alone[best]
    return found


def lookback_signals(answers: Answers, learned: Calibration) -> dict[str, Floats]:
    """Prompt mass, and what is left of it without what its position makes one expect."""
    residuals = lookback(answers, learned.expected)
    nothing = {"plain": torch.zeros_like(next(iter(learned.expected.values())))}
    found = {"lookback": lookback(answers, nothing)["plain"].mean(axis=0)}
    for how, values in residuals.items():
        found[f"lookback less expected ({how})"] = values.mean(axis=0)
    probed = np.tensordot(learned.probe, residuals["mean"], axes=1)
    found["lookback, heads by probe"] = probed
    found["lookback, heads by probe, less length"] = probed - learned.probe_slope * answers.terms["length"]
    return found


def doubt_signals(answers: Answers, learned: Calibration, scorer: AnswerScorer) -> dict[str, Floats]:
    """Doubts about the content words that are not copied, turned so that more is better."""
    threshold, ids = scorer.config.grounded_coverage.threshold, scorer.loaded.texts.ids
    parts: list[dict[str, float]] = []
    for chunk, attention in mixed(answers, head_weights(learned.copying)):
        prompts = chunk.rollout.prompts
        said, asked = ids[chunk.rollout.ids], ids[prompts.ids]
        same = (said[:, :, None] == asked[:, None, :]) & chunk.usable[:, None, :]
        for row, words in enumerate(chunk.words):
            content = [tokens for word, tokens in words if word not in learned.common]
            salient = prompts.words[row] >= 0
            parts.append(word_doubts(attention[row], same[row], salient, chunk.logprobs[row], content, threshold))
    shape = (len(answers.prompts), answers.candidates)
    return {f"- {name}": -np.array([part[name] for part in parts]).reshape(shape) for name in parts[0]}


def sibling_signals(answers: Answers, learned: Calibration) -> dict[str, Floats]:
    """Agreement with the other answers to the same prompt, word by word; words weigh by their inverse document frequency."""
    agreed = np.array([sibling_support(some, learned.content) for some in answers.said()])
    return {"siblings say it too": agreed[:, :, 0], "says what siblings say": agreed[:, :, 1]}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
