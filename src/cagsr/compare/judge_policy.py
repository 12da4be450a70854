"""Judge a policy on the test prompts: sampled, greedy, and its start at matched entropy."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cagsr.compare.jobs import GREEDY, MATCHED, SAMPLED, Job, write_file
from cagsr.compare.kept_answers import KeptAnswers, kept_answers
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import START, Plan
from cagsr.config import DataConfig, ModelConfig, SalienceConfig, TrainConfig
from cagsr.errors import ModelError
from cagsr.evaluation.judge_answers import AnswerJudge
from cagsr.evaluation.judges import Judges
from cagsr.evaluation.matched_entropy import SampledAnswers, answers_at, matching_temperature
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.association import Associations
from cagsr.reward.learn_associations import associations_of
from cagsr.reward.learn_probe import probe_of
from cagsr.reward.term import SUPPORT
from cagsr.reward.weigh import weigh
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.runs.lines import read_lines
from cagsr.support.progress import say, working

BATCH = 256
MATCHED_ON = 160
"""Prompts that settle the temperature of matched entropy, every second one where there are fewer than twice as many: well
enough, at a part of the cost."""
SAMPLING_SEED = 7
"""Added to the seed: test answers are not drawn with the seed of training."""


@working("judging the method")
def judge_method(plan: Plan, job: Job, model: Path | None, costs: Mapping[str, float]) -> None:
    """Judge one method with one seed and write its result, with its costs so far (seconds and labels).

    ``model`` is the policy's folder; None for the start and for best of N, which have no policy of their own.
    """
    with kept_answers(plan, job) as kept:
        result = _judged(plan, job, model, kept, costs)
        write_file(plan.result_file(job.target, result["seed"]), json.dumps(result))


def _judged(plan: Plan, job: Job, model: Path | None, kept: KeptAnswers, costs: Mapping[str, float]) -> dict[str, Any]:
    assert job.seed is not None
    began = time.perf_counter()
    config = _base_config(plan, job.target, job.seed)
    # One answer a prompt: more prompts tell more than more answers.
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_generations=1))
    start = load_start(plan, job.seed, config)
    prompts = test_prompts(plan, config, start)
    named = {name: plan.fill(value) for name, value in vars(plan.judges).items() if value is not None}
    judge = AnswerJudge(Judges(**named), start.device)
    seed = job.seed + SAMPLING_SEED

    def at(loaded: LoadedModel, temperature: float) -> tuple[SampledAnswers, float]:
        sampling = dataclasses.replace(config.sampling, temperature=temperature)
        return answers_at(loaded, prompts, sampling, seed, BATCH, entropies=temperature > 0), temperature

    def matched() -> tuple[SampledAnswers, float]:
        some = slice(None, None, max(2, math.ceil(len(prompts) / MATCHED_ON)))
        target = float(np.mean(found[SAMPLED].entropy[some]))
        return at(start, matching_temperature(start, prompts[some], config.sampling, target, seed, BATCH))

    found: dict[str, SampledAnswers] = {}
    temperature = None
    if job.target != START and plan.methods[job.target].kind == "best_of_n":
        found[SAMPLED] = best_of_n(plan, job, config, start, seed)
    else:
        policy = ModelConfig(path=str(model), device=config.model.device)
        loaded = start if model is None else load_model(policy, for_training=False)
        found[SAMPLED], _ = kept.get(SAMPLED, lambda: at(loaded, config.sampling.temperature))
        found[GREEDY], _ = kept.get(GREEDY, lambda: at(loaded, 0.0))
        if model is not None:
            try:
                found[MATCHED], temperature = kept.get(MATCHED, matched)
            except ModelError as error:  # a collapsed policy: as peaked as it the start never is
                say(f"Left out, the start at matched entropy: {error}")
    values: dict[str, dict[str, list[float]]] = {}
    for name, answers in found.items():
        measured = judge.measure(prompts, answers.texts) | {"tokens": answers.tokens, "entropy": answers.entropy}
        # Measures that no row has are left out.
        values[name] = {measure: column.tolist() for measure, column in measured.items() if np.isfinite(column).any()}
    return {
        "method": job.target,
        "seed": job.seed,
        "prompts": [encoded.prompt.text for encoded in prompts],
        "temperature": temperature,
        "values": values,
        "texts": {name: list(answers.texts) for name, answers in found.items()},
        "training": [] if model is None else _training_curve(model.parent),
        "costs": {**costs, "judge_seconds": time.perf_counter() - began},
    }


def load_start(plan: Plan, seed: int, config: TrainConfig) -> LoadedModel:
    """The supervised start of a seed, on the device of a method's settings."""
    path = str(plan.start_folder(seed))
    return load_model(ModelConfig(path=path, device=config.model.device), for_training=False)


def _base_config(plan: Plan, target: str, seed: int) -> TrainConfig:
    """The method's own settings; the start and DPO are judged as the plan's base would sample."""
    own = target != START and plan.methods[target].kind != "dpo"
    return reward_settings(plan, target if own else plan.settings_method, seed)


def test_prompts(plan: Plan, config: TrainConfig, loaded: LoadedModel) -> list[EncodedPrompt]:
    """The test prompts as the model reads them, with their references in the columns."""
    room = loaded.room_for_prompts(config.sampling.max_new_tokens)
    data = dataclasses.replace(
        config.data, path=plan.fill(plan.files.test), limit=plan.files.test_limit, streaming=False
    )
    uniform = SalienceConfig(weighting="uniform")
    columns = [] if plan.judges.follow_up_column is None else [plan.judges.follow_up_column]
    return list(
        prepare_prompts(
            data, uniform, loaded.tokenizer, max_length=room, text_columns=columns, vision=loaded.vision
        ).prompts
    )


@working("taking the best of N")
def best_of_n(plan: Plan, job: Job, config: TrainConfig, loaded: LoadedModel, seed: int) -> SampledAnswers:
    """The best of N answers of the start by the method's reward: what the reward is worth without training."""
    assert job.seed is not None
    method = plan.methods[job.target]
    data = dataclasses.replace(config.data, path=plan.fill(plan.files.test), limit=plan.files.test_limit)
    learned = config.reward.needs("associations")
    weighed, scorer, _ = prompts_and_scorer(config, loaded, data, job.seed, associated=learned, micro_batch_size=BATCH)
    sampling = dataclasses.replace(config.sampling, num_generations=method.num_generations)
    texts: list[str] = []
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in scorer.weights}
    sampled: list[torch.Tensor] = []  # entropy, tokens, ended
    for _, rollout in sample_in_batches(loaded, weighed, sampling, seed, max(1, BATCH // method.num_generations)):
        batch = scorer.batch(rollout)
        for name, values in scorer.values(batch).items():
            raw[name].append(values)
        texts += rollout.completions
        tokens = rollout.sampled.sum(dim=1)
        entropy = (batch.readings.entropy * rollout.sampled).sum(dim=1) / tokens
        sampled.append(torch.stack([column.double() for column in (entropy, tokens, rollout.ended)]).cpu())
    # As ``cagsr rank`` does it: scales from the answers to all prompts, the winner of each prompt's own.
    group = torch.arange(len(weighed)).repeat_interleave(method.num_generations)
    terms = {name: torch.cat(values) for name, values in raw.items()}
    total = weigh(terms, scorer.weights, config.reward, group).total
    best = total.view(len(weighed), -1).argmax(dim=1) + torch.arange(len(weighed)) * method.num_generations
    return SampledAnswers(tuple(texts[row] for row in best.tolist()), *torch.cat(sampled, dim=1)[:, best].numpy())


def prompts_and_scorer(
    config: TrainConfig,
    loaded: LoadedModel,
    data: DataConfig,
    seed: int,
    *,
    associated: bool,
    micro_batch_size: int = 32,
) -> tuple[Sequence[EncodedPrompt], AnswerScorer, Associations | None]:
    """Prompts of ``data`` and a method's reward: words weigh, and go together, as in its training prompts.

    What goes together is learned, if ``associated``, from answers of the start, which ``seed`` draws.
    """
    room = loaded.room_for_prompts(config.sampling.max_new_tokens)
    training = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=room, vision=loaded.vision)
    prompts = prepare_prompts(
        data, config.salience, loaded.tokenizer, max_length=room, frequency=training.frequency, vision=loaded.vision
    ).prompts
    associations = None
    if associated:
        settings = config.reward.associations
        associations = associations_of(loaded, training.prompts, config.sampling, settings, seed=seed)
    probe = None
    if config.reward.needs(SUPPORT):
        how = (config.sampling, config.reward.probe)
        probe = probe_of(loaded, training.prompts, training.frequency, *how, seed=seed)
    scorer = AnswerScorer(
        loaded,
        config.reward,
        config.attention,
        config.salience,
        temperature=config.sampling.temperature,
        micro_batch_size=micro_batch_size,
        associations=associations,
        frequency=training.frequency,
        probe=probe,
    )
    return prompts, scorer, associations


def _training_curve(run: Path) -> list[dict[str, float]]:
    """Reward, held-out metric, KL, length and repetition at each evaluation of a run."""
    kept = {
        "objective/raw_scores": "reward",
        "eval/metric": "held_out",
        "eval/metric_greedy": "held_out_greedy",
        "objective/kl": "kl",
        "response/length": "length",
        "response/repetition": "repetition",
        "policy/entropy_avg": "entropy",
    }
    return [
        {"step": float(row["step"])} | {name: float(row[key]) for key, name in kept.items() if row.get(key) is not None}
        for row in read_lines(run / "metrics.jsonl")
    ]
