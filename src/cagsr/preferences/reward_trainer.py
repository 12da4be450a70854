"""A reward model from preference pairs, on TRL's RewardTrainer, with its accuracy on pairs of held-out prompts."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from cagsr.config import RewardModelConfig
from cagsr.errors import ModelError
from cagsr.evaluation.intervals import Interval, mean_interval
from cagsr.models.load import LoadedModel, add_lora, load_model
from cagsr.preferences.pairs import (
    TRAINER_ARGUMENTS,
    OrderByEpoch,
    PreferencePair,
    encode_within_limit,
    prompt_key,
    read_preferences,
    split_by_prompt,
    subset,
)
from cagsr.reward.model import RewardModel, encode_answered
from cagsr.runs.saved import TEXTS, Saved, scores_probe
from cagsr.runs.trl_training import Outcome, Training, mean_of, train_with_trl
from cagsr.support.progress import working


@dataclass(frozen=True)
class PairAccuracy:
    """How often a reward model prefers what was preferred, on ``pairs`` of ``prompts`` it was not trained on."""

    accuracy: Interval
    """Mean over prompts of the share of their pairs that are ranked right (ties count half), bootstrap over prompts."""
    pair_accuracy: float
    """Share of all pairs that are ranked right, ties half."""
    margin: float
    """Mean score of the chosen less that of the rejected answer."""
    pairs: int
    prompts: int


def train_reward_model(config: RewardModelConfig, *, quiet: bool = False) -> Path:
    """Train a reward model on preference pairs (Bradley-Terry; Ouyang et al., 2022, section 3.5) and measure it.

    The model is ``config.model`` with a fresh scalar head in place of its language-model head. It reads the very tokens
    that ``cagsr.reward.model`` makes of a prompt and a sampled answer when it scores. ``metrics.json`` and the card hold
    the accuracy on the held-out pairs, measured on the saved folder by the code that training with it runs. The rest as
    ``train_with_trl``.
    """
    return train_with_trl(config, "reward-model", lambda config: load_model(config.model), _prepare, quiet=quiet)


def _prepare(config: RewardModelConfig, loaded: LoadedModel, limit: int | None) -> Training:
    read: list[str] = []
    training, others = _divide(config, loaded.tokenizer, read)

    def encode(pair: PreferencePair) -> dict[str, Any]:
        return _encode(pair, loaded.tokenizer)

    rows = [row for _, row in encode_within_limit(training, encode, config, limit)]
    # What can't be measured is known now, not once the training is done.
    source = config.eval_data or config.data.path
    held_out = [pair for pair, _ in encode_within_limit(others, encode, config, limit, source)]
    seen = len({prompt_key(pair) for pair in training} & {prompt_key(pair) for pair in held_out})
    if unmeasured := len(others) - len(held_out):
        read.append(
            f"{unmeasured:,} held-out pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop)."
        )
    if held_out:
        read.append(f"Accuracy is measured on {len(held_out):,} other pairs.")
    if seen:
        read.append(f"Careful: {seen:,} prompts of --eval_data are trained on too, so the accuracy is flattering.")

    def describe(trainer: Any, saved: Saved) -> Outcome:
        measured = None
        if held_out:
            model = RewardModel("trained", saved.model.eval(), loaded.tokenizer, loaded.context_length())
            with working("measuring on held-out pairs"):
                measured = pair_accuracy(model, held_out)
        steps, loss = trainer.state.global_step, mean_of(trainer, "loss")
        metrics: dict[str, Any] = {"pairs": len(rows), "steps": steps, "loss": loss}
        if measured is not None:
            metrics["held_out"] = {**asdict(measured), "prompts_also_trained_on": seen, "data": source}
        facts = [
            f"Held-out accuracy: {_accuracy(config, measured)}",
            f"Data: {len(rows):,} preference pairs from `{config.data.path}`.",
            "It reads prompt and answer as one text, without an end token: `cagsr train --reward.models` gives it just that.",
        ]
        said = _how_good(measured, mean_of(trainer, "accuracy"))
        return Outcome(facts, [said], {"metrics.json": json.dumps(metrics, indent=2) + "\n"})

    return Training(
        trainer=partial(_Trainer, _classifier(loaded, config)),
        arguments=partial(
            TrlRewardConfig, **TRAINER_ARGUMENTS, center_rewards_coefficient=config.center_rewards or None
        ),
        rows=rows,
        dropped=len(training) - len(rows),
        notes=read,
        probe=scores_probe(loaded, [row[side] for row in rows[:TEXTS] for side in ("chosen_ids", "rejected_ids")]),
        describe=describe,
        what=f"A reward model from `{config.model.path}`",
        library="TRL's RewardTrainer",
        limits="It knows the preferences of its pairs and nothing else: answers unlike those pairs get scores that mean "
        "little, and a policy\ntrained against it will find them.",
        task="text-classification",
    )


class _Trainer(OrderByEpoch, RewardTrainer):
    """TRL's trainer, dealing the pairs in an order that a resumed training repeats."""


def pair_accuracy(model: RewardModel, pairs: Sequence[PreferencePair]) -> PairAccuracy:
    """Score both answers of each pair as training with this reward model would, and count who wins."""
    prompts = [pair.prompt for pair in pairs]
    end = model.tokenizer.eos_token
    chosen = model.score(prompts, [_without_end(pair.chosen, end) for pair in pairs])
    rejected = model.score(prompts, [_without_end(pair.rejected, end) for pair in pairs])
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    by_prompt: dict[Any, list[float]] = defaultdict(list)
    for pair, value in zip(pairs, right.tolist(), strict=True):
        by_prompt[prompt_key(pair)].append(value)
    return PairAccuracy(
        accuracy=mean_interval([sum(values) / len(values) for values in by_prompt.values()]),
        pair_accuracy=float(right.mean()),
        margin=float((chosen - rejected).mean()),
        pairs=len(pairs),
        prompts=len(by_prompt),
    )


def _divide(
    config: RewardModelConfig, tokenizer: Any, notes: list[str]
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs to train on, in random order, and those to measure on."""
    pairs = read_preferences(config, tokenizer, notes=notes)
    if config.eval_data is not None:
        held_out = read_preferences(config, tokenizer, config.eval_data, notes)
    else:
        pairs, held_out = split_by_prompt(pairs, config.held_out, config.seed)
    return subset(pairs, config.num_pairs, config.seed), held_out


def _encode(pair: PreferencePair, tokenizer: Any) -> dict[str, Any]:
    chosen, rejected = (
        encode_answered(pair.prompt, _without_end(answer, tokenizer.eos_token), tokenizer)
        for answer in (pair.chosen, pair.rejected)
    )
    return {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}


def _without_end(answer: str, end: str | None) -> str:
    """An answer without a written end token, which a sampled answer doesn't have either."""
    return answer.removesuffix(end) if end else answer


def _classifier(loaded: LoadedModel, config: RewardModelConfig) -> nn.Module:
    """The loaded model's body under a fresh scalar head, with LoRA adapters if asked for."""
    settings = loaded.model.config
    settings.num_labels = 1
    torch.manual_seed(config.seed)
    try:
        classifier = AutoModelForSequenceClassification.from_config(
            settings, trust_remote_code=config.model.trust_remote_code
        )
    except ValueError as error:
        raise ModelError(
            f"--model {loaded.path}: transformers has no sequence classifier for {settings.model_type} models; start "
            "from another model."
        ) from error
    body = classifier.base_model_prefix
    setattr(classifier, body, getattr(loaded.model, body))
    classifier.to(loaded.device)
    # The task has peft train and save the head as well.
    return add_lora(classifier, config.lora, "SEQ_CLS") if config.lora.r > 0 else classifier


def _how_good(measured: PairAccuracy | None, training: float | None) -> str:
    """The accuracy on held-out pairs; without them, that it was measured on none."""
    if measured is not None:
        return f"accuracy {measured.accuracy} on {measured.pairs:,} held-out pairs"
    trained_on = "" if training is None else f"; {training:.3f} in training"
    return f"accuracy not measured, no pairs were held out{trained_on}"


def _accuracy(config: RewardModelConfig, measured: PairAccuracy | None) -> str:
    if measured is None:
        return "Not measured: no pairs were held out."
    source = f"`{config.eval_data}`" if config.eval_data else "prompts kept out of training"
    return (
        f"{measured.accuracy} (mean over {measured.prompts:,} prompts, 95 % bootstrap interval over prompts), on "
        f"{measured.pairs:,} pairs of {source}; {measured.pair_accuracy:.3f} of all pairs. Chance is 0.5."
    )
