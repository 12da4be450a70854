"""Does the reward see the truth? Measured on the starts, before any training, with the worst disagreements as text."""

import dataclasses
import json
from typing import Any

import numpy as np

from cagsr.compare.jobs import Job, write_file
from cagsr.compare.judge_policy import load_start, prompts_and_scorer
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import Plan
from cagsr.diagnosis.best_of_n import correlation, oracle_share
from cagsr.diagnosis.diagnose import load_checker, with_truth
from cagsr.diagnosis.recommend import weighted_reward, within_z, z_sums
from cagsr.diagnosis.signals import SignalReader, Signals, collect_signals
from cagsr.evaluation.intervals import Floats
from cagsr.support.progress import working

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
    loaded = load_start(plan, job.seed, config)
    path = plan.fill(plan.validity.file or plan.files.held_out)
    data = dataclasses.replace(config.data, path=path, limit=plan.validity.prompts)
    prompts, scorer, associations = prompts_and_scorer(config, loaded, data, job.seed, associated=True)
    sampling = dataclasses.replace(config.sampling, num_generations=8)
    signals = collect_signals(
        SignalReader(loaded, scorer, config.attention), prompts, sampling, seed=job.seed, chunk=16
    )
    truths: dict[str, Floats] = {}
    for label, checker in plan.validity.checkers.items():
        judged = with_truth(signals, load_checker(checker))
        assert judged.truth is not None
        truths[label] = judged.truth
    columns: dict[str, Floats] = dict(signals.terms)
    columns |= z_sums(signals.terms, SUMS, penalty=0.5)
    columns[f"reward of {name}"] = reward = weighted_reward(signals.terms, scorer.weights, config.reward)
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
    write_file(plan.result_file("validity", job.seed), json.dumps(found, ensure_ascii=False))


def worst_disagreements(signals: Signals, reward: Floats, truth: Floats, count: int) -> list[dict[str, Any]]:
    """The pairs of answers to one prompt on which reward and truth differ most, one a prompt, worst first.

    For each prompt the pair that maximises (reward of a - reward of b) x (truth of b - truth of a), both in their
    standard deviations within prompts.
    """
    r, t = within_z(reward), within_z(truth)
    preferred, better = np.maximum(r[:, :, None] - r[:, None, :], 0), np.maximum(t[:, None, :] - t[:, :, None], 0)
    gaps = preferred * better  # (prompts, a, b)
    worst = gaps.reshape(len(gaps), -1).max(axis=1)
    found = []
    for row in np.argsort(-worst)[:count]:
        if worst[row] <= 0:
            break
        one: dict[str, Any] = {"prompt": signals.prompts[row].prompt.text}
        places = np.unravel_index(gaps[row].argmax(), gaps[row].shape)
        for name, place in zip(("preferred", "better"), places, strict=True):
            one[name] = signals.completions[row][place]
            one |= {f"{name}_reward": float(r[row, place]), f"{name}_truth": float(truth[row, place])}
        found.append(one)
    return found


def _examples(associations: Any, count: int = 12) -> list[dict[str, Any]]:
    """The prompt words and pairs with the strongest associations beyond themselves, for people to look at."""
    said = {
        feature: [one for one in associations.strongest(feature, 4) if one[0] not in feature.split()]
        for feature in associations.prompt_index
    }
    rows = [{"prompt": feature, "answer": answer} for feature, answer in said.items() if answer]
    return sorted(rows, key=lambda row: -row["answer"][0][1])[:count]
