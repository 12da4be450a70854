"""Does the reward see the truth? Measured on the starts, before any training, with the worst disagreements as text."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cagsr.associate import associations_of
from cagsr.compare.jobs import Job, start_folder, validity_file
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import Plan
from cagsr.config import ModelConfig
from cagsr.evaluation.best_of_n import correlation, oracle_share
from cagsr.evaluation.collect import Signals, collect_signals
from cagsr.evaluation.diagnosis import load_checker, with_truth
from cagsr.evaluation.recommend import PENALTIES, weighted_parts, within_z
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.answers import AnswerScorer
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import working

Floats = NDArray[np.float64]

SUMS: tuple[tuple[str, ...], ...] = (
    ("coverage", "self_certainty"),
    ("coverage", "self_certainty", "copy_coverage"),
    ("grounded_coverage", "self_certainty"),
    ("associated_coverage", "grounded_coverage"),
    ("associated_coverage", "unsupported"),
    ("associated_coverage", "grounded_coverage", "unsupported"),
    ("associated_coverage", "grounded_coverage", "unsupported", "self_certainty"),
)
"""Sums of z-scores within a prompt that are measured besides the single terms; a penalty counts half, with a minus."""


@working("measuring what the reward sees")
def measure_validity(plan: Plan, job: Job) -> None:
    """Sample answers of a start, compute every term and every truth, and write correlations and disagreements."""
    assert plan.validity is not None
    assert job.seed is not None
    name = plan.settings_method
    config = reward_settings(plan, name, job.seed)
    loaded = load_model(
        ModelConfig(path=str(start_folder(plan.folder, job.seed)), device=config.model.device), for_training=False
    )
    room = loaded.room_for_prompts(config.sampling.max_new_tokens)
    training = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=room)
    data = dataclasses.replace(
        config.data, path=plan.fill(plan.validity.file or plan.files.held_out), limit=plan.validity.prompts
    )
    prompts = prepare_prompts(
        data, config.salience, loaded.tokenizer, max_length=room, frequency=training.frequency
    ).prompts
    associations = associations_of(loaded, training.prompts, config.sampling, config.reward.associations, seed=job.seed)
    scorer = AnswerScorer(
        loaded,
        config.reward,
        config.attention,
        config.salience,
        temperature=config.sampling.temperature,
        associations=associations,
    )
    sampling = dataclasses.replace(config.sampling, num_generations=8)
    signals = collect_signals(loaded, prompts, sampling, scorer, config.attention, seed=job.seed, chunk=16)
    truths: dict[str, Floats] = {}
    for label, path in plan.validity.checkers.items():
        judged = with_truth(signals, load_checker(path))
        assert judged.truth is not None
        truths[label] = judged.truth
    columns: dict[str, Floats] = dict(signals.terms)
    for names in SUMS:
        if all(part in signals.terms for part in names):
            columns[_label(names)] = sum_of(signals, names)
    parts = weighted_parts(signals.terms, scorer.weights, config.reward.normalize, config.reward.clip)
    columns[f"reward of {name}"] = reward = sum(parts.values(), np.zeros_like(signals.length))
    first = next(iter(truths.values()))
    rows = {
        label: {
            "length": correlation(values, signals.length),
            **{truth: correlation(values, known) for truth, known in truths.items()},
            "oracle_share": dataclasses.asdict(oracle_share(values, first)),
        }
        for label, values in columns.items()
        if np.isfinite(values).any()
    }
    found: dict[str, Any] = {
        "seed": job.seed,
        "prompts": len(prompts),
        "candidates": 8,
        "truths": list(truths),
        "mean": float(first.mean()),
        "oracle": float(first.max(axis=1).mean()),
        "signals": rows,
        "disagreements": worst_disagreements(signals, reward, first, plan.validity.disagreements),
        "associations": _examples(associations),
    }
    file = validity_file(plan, job.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, json.dumps(found, ensure_ascii=False))


def sum_of(signals: Signals, names: tuple[str, ...]) -> Floats:
    """Sum of z-scores within a prompt, penalties with weight -0.5; ``(prompts, candidates)``."""
    return np.sum([(-0.5 if name in PENALTIES else 1.0) * within_z(signals.terms[name]) for name in names], axis=0)


def _label(names: tuple[str, ...]) -> str:
    return names[0] + "".join(f" - 0.5 {name}" if name in PENALTIES else f" + {name}" for name in names[1:])


def worst_disagreements(signals: Signals, reward: Floats, truth: Floats, count: int) -> list[dict[str, Any]]:
    """The pairs of answers to one prompt on which reward and truth differ most, one a prompt, worst first.

    For each prompt the pair that maximises (reward of a - reward of b) x (truth of b - truth of a), both in their
    standard deviations within prompts.
    """
    r, t = within_z(reward), within_z(truth)
    gaps = np.maximum(r[:, :, None] - r[:, None, :], 0) * np.maximum(
        t[:, None, :] - t[:, :, None], 0
    )  # (prompts, a, b)
    worst = gaps.reshape(len(gaps), -1).max(axis=1)
    found = []
    for row in np.argsort(-worst)[:count]:
        if worst[row] <= 0:
            break
        preferred, better = np.unravel_index(gaps[row].argmax(), gaps[row].shape)
        found.append(
            {
                "prompt": signals.prompts[row].prompt.text,
                "preferred": signals.completions[row][preferred],
                "preferred_reward": float(r[row, preferred]),
                "preferred_truth": float(truth[row, preferred]),
                "better": signals.completions[row][better],
                "better_reward": float(r[row, better]),
                "better_truth": float(truth[row, better]),
            }
        )
    return found


def _examples(associations: Any, count: int = 12) -> list[dict[str, Any]]:
    """The prompt words and pairs with the strongest associations beyond themselves, for people to look at."""
    rows = []
    for feature in associations.prompt_index:
        words = [
            (word, strength) for word, strength in associations.strongest(feature, 4) if word not in feature.split()
        ]
        if words:
            rows.append({"prompt": feature, "answer": words})
    rows.sort(key=lambda row: -row["answer"][0][1])
    return rows[:count]
