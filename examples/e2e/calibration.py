"""Fifty judgements that set the terms' weights, against a reward model trained on eight hundred.

    python -m examples.e2e.calibration --work runs/paper --start runs/paper/start-seed0 --markdown calibration.md

reads people's pairs (``human.*.jsonl``) and unlabelled prompts of the folder that the paper's plan makes. Their prompts are dealt
into folds: every pair is judged by weights and by a reward model that saw none of its prompt. Best of eight answers to
other prompts says what each choice does for facts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from cagsr.config import AttentionConfig, DataConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.errors import DataError, RunError
from cagsr.evaluation.intervals import mean_interval, paired_difference
from cagsr.flow import Prompt
from cagsr.models.load import load_model
from cagsr.preferences.calibrate import agreement, calibrated
from cagsr.preferences.term_differences import pair_differences, term_scales
from cagsr.prompts.prepare import prepare_prompts
from cagsr.rating.disagreement import disagreement
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_associations import associations_of
from cagsr.reward.model import load_reward_model
from cagsr.reward.values import TermValues
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import each, shown
from cagsr.support.tables import markdown_table
from examples.e2e.prepare import read_jsonl, write_jsonl
from examples.e2e.rewards import report

Floats = NDArray[np.float64]
RECOMMENDED = {"associated_coverage": 0.85, "grounded_coverage": 0.25, "unsupported": -0.6, "repetition": -0.3}
"""What ``cagsr diagnose`` recommends for the small Llama on E2E."""


@dataclass(frozen=True)
class Options:
    """Compare calibrated weights with reward models."""

    work: Path
    """Folder of the paper's plan: human.train.jsonl, human.held_out.jsonl, human.judge.jsonl if there, unlabelled.jsonl."""
    start: str
    """The starting model, which scores."""
    labels: int = 50
    """Judgements that weights are fitted to."""
    against: int = 800
    """Pairs that a reward model is trained on."""
    folds: int = 4
    """Of the prompts; one reward model each."""
    draws: int = 10
    """Choices of so many judgements, in each fold."""
    shrinkage: float = 30.0
    """As of ``cagsr calibrate``."""
    fact_prompts: int = 240
    """Prompts whose best of eight answers is judged by the facts it says."""
    epochs: float = 2.0
    """Of a reward model."""
    markdown: Path | None = None
    """Where the table goes."""


@dataclass(frozen=True)
class Choice:
    """How one way to judge does: on people's pairs, and by what it picks."""

    name: str
    labels: int
    agrees: Floats
    """``(pairs,)`` share in which it prefers what people preferred."""
    said: Floats
    """``(folds, prompts)`` facts said by the best of eight."""
    added: Floats


@shown("calibration")
def main(options: Options) -> None:
    """Score, fit, train, compare."""
    rows = [
        row
        for part in ("train", "held_out", "judge")
        if (options.work / f"human.{part}.jsonl").is_file()
        for row in read_jsonl(options.work / f"human.{part}.jsonl")
    ]
    if not rows:
        raise DataError(f"{options.work}: no human.train.jsonl there; make it with python -m examples.e2e.preferences.")
    folder = options.work / "calibration"
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", rows)
    salience, sampling = SalienceConfig(idf_power=0.0), SamplingConfig(num_generations=8, max_new_tokens=64)
    loaded = load_model(ModelConfig(options.start, device="cpu"), for_training=False)
    room = loaded.room_for_prompts(sampling.max_new_tokens)
    pairs = prepare_prompts(
        DataConfig(str(folder / "pairs.jsonl")), salience, loaded.tokenizer, max_length=room
    ).prompts
    free = prepare_prompts(
        DataConfig(str(options.work / "unlabelled.jsonl")), salience, loaded.tokenizer, max_length=room
    )
    others = free.prompts[: options.fact_prompts]
    reward = RewardConfig()
    scorer = AnswerScorer(
        loaded,
        reward,
        AttentionConfig(layers="last-4"),
        salience,
        associations=associations_of(loaded, free.prompts, sampling, reward.associations, seed=0),
        frequency=free.frequency,
    )
    scales = term_scales(scorer, others[:64], sampling, 1)
    judged = pair_differences(scorer, scales, pairs, ("chosen", "rejected"))
    texts: list[str] = []
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in scorer.weights}
    for _, rollout in sample_in_batches(loaded, others, sampling, 2, 16):
        texts += rollout.completions
        for name, value in scorer.values(scorer.batch(rollout)).items():
            raw[name].append(value)
    group = torch.arange(len(others)).repeat_interleave(8)
    columns = [scales.normalizer(name, TermValues.of(torch.cat(raw[name]).double()), group) for name in scales.names]
    answers = torch.stack(columns, dim=1).numpy()
    repeated = [one.prompt for one in others for _ in range(8)]
    facts = report([one.text for one in repeated], texts)
    truth = {name: np.array([one[name] for one in facts]).reshape(-1, 8) for name in ("missed", "added")}

    def picked(value: Floats) -> tuple[Floats, Floats]:
        best = value.reshape(-1, 8).argmax(axis=1)
        every = np.arange(len(best))
        return 1 - truth["missed"][every, best], truth["added"][every, best]

    fold_of = folds(judged.prompts, options.folds)
    choices = []
    for name, given in (("default", {"grounded_coverage": 1.0, "repetition": -0.3}), ("recommended", RECOMMENDED)):
        prior = np.array([given.get(term, 0.0) for term in scales.names])
        said, added = picked(answers @ prior)
        choices.append(Choice(f"{name} weights", 0, agreement(judged.differences @ prior), said[None], added[None]))
        torn = disagreement(judged.differences * np.sign(answers.T @ (answers @ prior)))
        for how, order in (("", None), (", asked where terms disagree", torn)):
            done = _calibrated(options, judged.differences, prior, fold_of, order, lambda w: picked(answers @ w))
            choices.append(replace(done, name=f"{name}, calibrated{how}"))
    choices.append(
        _reward_models(options, rows, [one.prompt for one in pairs], fold_of, repeated, texts, folder, picked)
    )
    text = table(choices, judged.prompts, truth)
    print(text)
    if options.markdown is not None:
        write_text_atomically(options.markdown, text + "\n")


def folds(prompts: Sequence[str], count: int) -> NDArray[np.int64]:
    """``(pairs,)`` the fold of each pair, the same for pairs of one prompt."""
    known = sorted(set(prompts))
    place = dict(zip(known, np.random.default_rng(0).permutation(len(known)) % count, strict=True))
    return np.array([place[one] for one in prompts])


def _calibrated(
    options: Options,
    differences: Floats,
    prior: Floats,
    fold_of: NDArray[np.int64],
    first: Floats | None,
    picked: Callable[[Floats], tuple[Floats, Floats]],
) -> Choice:
    """Weights from some judgements of the other folds, several times over: drawn, or of half of them those largest in ``first``."""
    agrees, said, added = np.zeros(len(differences)), [], []
    for fold in range(options.folds):
        inside, outside = fold_of == fold, np.flatnonzero(fold_of != fold)
        for draw in range(options.draws):
            some = np.random.default_rng([fold, draw]).permutation(outside)
            if first is not None:
                some = some[: len(some) // 2]
                some = some[np.argsort(-first[some])]
            some = some[: options.labels]
            weights = calibrated(differences[some], prior, options.shrinkage)
            agrees[inside] += agreement(differences[inside] @ weights) / options.draws
            best = picked(weights)
            said.append(best[0])
            added.append(best[1])
    return Choice("calibrated", options.labels, agrees, np.array(said), np.array(added))


def _reward_models(
    options: Options,
    rows: list[dict[str, Any]],
    prompts: list[Prompt],
    fold_of: NDArray[np.int64],
    asked: Sequence[Prompt],
    texts: Sequence[str],
    folder: Path,
    picked: Callable[[Floats], tuple[Floats, Floats]],
) -> Choice:
    """A reward model for each fold, trained on pairs of the others; one that is there already is read."""
    agrees, said, added = np.zeros(len(rows)), [], []
    for fold in each("reward models", range(options.folds), "folds"):
        path, inside = folder / f"reward-{options.against}-{fold}", np.flatnonzero(fold_of == fold).tolist()
        if not (path / "metrics.json").is_file():
            data = folder / f"others-{fold}.jsonl"
            write_jsonl(data, [row for row, own in zip(rows, fold_of, strict=True) if own != fold])
            command = [sys.executable, "-m", "cagsr.commands.main", "reward-model", "--model", options.start]
            command += [
                "--data",
                str(data),
                "--output_dir",
                str(path),
                "--num_pairs",
                str(options.against),
                "--overwrite",
            ]
            command += [
                "--learning_rate",
                "2e-4",
                "--batch_size",
                "16",
                "--epochs",
                str(options.epochs),
                "--held_out",
                "0.02",
            ]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            if found.returncode:
                raise RunError(f"cagsr reward-model failed: {found.stderr.strip().splitlines()[-1:]}")
        model = load_reward_model(str(path), "cpu")
        own = [prompts[row] for row in inside]
        better, worse = (model.score(own, [str(rows[row][side]) for row in inside]) for side in ("chosen", "rejected"))
        agrees[inside] = agreement((better - worse).double().numpy())
        best = picked(replace(model, batch_size=64).score(asked, texts).double().numpy())
        said.append(best[0])
        added.append(best[1])
    return Choice("a reward model", options.against, agrees, np.array(said), np.array(added))


def table(choices: Sequence[Choice], prompts: Sequence[str], truth: dict[str, Floats]) -> str:
    """One row a way to judge, and what lies between some of them; intervals over prompts (and folds)."""
    place = {one: index for index, one in enumerate(sorted(set(prompts)))}
    own = np.array([place[one] for one in prompts])
    count = np.bincount(own)

    def by_prompt(values: Floats) -> Floats:
        return np.bincount(own, weights=values) / count

    cells = [
        [
            one.name,
            str(one.labels),
            str(mean_interval(by_prompt(one.agrees))),
            str(mean_interval(one.said)),
            str(mean_interval(one.added)),
        ]
        for one in choices
    ]
    header = ["judged by", "labels", "agrees with people (other prompts)", "best of 8: facts said", "added"]
    mean, most = 1 - truth["missed"].mean(), (1 - truth["missed"]).max(axis=1).mean()
    between = []
    for number, one in enumerate(choices[:-1]):
        for other in (choices[-1], *choices[number - number % 3 : number]):
            agrees = paired_difference(by_prompt(one.agrees), by_prompt(other.agrees))
            said = paired_difference(one.said.mean(axis=0), other.said.mean(axis=0))
            added = paired_difference(one.added.mean(axis=0), other.added.mean(axis=0))
            between.append([f"{one.name} less {other.name}", f"{agrees:+.3f}", f"{said:+.3f}", f"{added:+.3f}"])
    return "\n".join(
        [
            markdown_table(header, cells),
            "",
            f"Of all sampled answers {mean:.3f} of the facts are said, by the best of eight {most:.3f}.",
            "",
            markdown_table(["", "agrees with people", "facts said", "added"], between),
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
