"""A reward model from preference pairs, on TRL's RewardTrainer, with its accuracy on pairs of held-out prompts."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from cagsr import __version__
from cagsr.config import RewardModelConfig
from cagsr.errors import ModelError
from cagsr.evaluation.metrics import Interval, mean_interval
from cagsr.models.load import LoadedModel, add_lora, load_model
from cagsr.preferences.pairs import (
    BY_LENGTH,
    OrderByEpoch,
    PreferencePair,
    encode_all,
    read_preferences,
    within_limit,
)
from cagsr.preferences.split import prompt_key, split_by_prompt, subset
from cagsr.reward.model import RewardModel, encode_answered
from cagsr.runs.saved import TEXTS, Saved, ScoreProbe, dtype_note, saved_facts
from cagsr.runs.trainer_folder import (
    check_trainer_config,
    length_limit,
    mean_of,
    open_trainer_folder,
    run_trainer,
    save_trained,
    say_done,
    settings_file,
    trainer_arguments,
)
from cagsr.support.progress import working

COMMAND = "reward-model"


@dataclass(frozen=True)
class PairAccuracy:
    """How often a reward model prefers what was preferred, on pairs it was not trained on."""

    accuracy: Interval
    """Mean over prompts of the share of their pairs that are ranked right (ties count half), bootstrap over prompts."""
    pair_accuracy: float
    """Share of all pairs that are ranked right, ties half."""
    margin: float
    """Mean score of the chosen less that of the rejected answer."""
    pairs: int
    """Pairs measured on."""
    prompts: int
    """Their prompts."""


def train_reward_model(config: RewardModelConfig, *, quiet: bool = False) -> Path:
    """Train a reward model on preference pairs (Bradley-Terry; Ouyang et al., 2022, section 3.5) and measure it.

    The model is ``config.model`` with a fresh scalar head in place of its language-model head. It reads the very tokens
    that ``cagsr.reward.model`` makes of a prompt and a sampled answer when it scores. ``metrics.json`` and the card hold
    the accuracy on the held-out pairs, measured on the saved folder by the code that training with it runs.

    Args:
        config: see ``RewardModelConfig``.
        quiet: print nothing.

    Returns:
        The output folder, ready for ``cagsr train --reward.models``.

    Raises:
        CagsrError: bad input, in one sentence; an output folder that holds something else.
    """
    folder = Path(config.output_dir)
    check_trainer_config(config, COMMAND)
    torch.manual_seed(config.seed)  # rows of a vocabulary that grows
    loaded = load_model(config.model)
    if not loaded.architecture.one_sequence:
        raise ModelError(
            f"--model {config.model.path} is an encoder-decoder model; a reward model is made from a decoder-only one."
        )
    limit = length_limit(config, loaded)
    read: list[str] = []
    training, held_out = _divide(config, loaded.tokenizer, read)
    encoded, dropped = encode_all(
        training,
        lambda pair: _encode(pair, loaded.tokenizer),
        _length,
        config,
        limit,
    )
    # What can't be measured is known now, not once the training is done.
    measurable = within_limit(
        held_out,
        lambda pair: _length(_encode(pair, loaded.tokenizer)),
        config,
        limit,
        config.eval_data or config.data.path,
    )
    unmeasured, held_out = len(held_out) - len(measurable), measurable
    seen = len({prompt_key(pair) for pair in training} & {prompt_key(pair) for pair in held_out})
    notes = [*loaded.notes, f"{len(encoded):,} pairs from {config.data.path}.", *read]
    notes.append(dtype_note(config.save_dtype, loaded, "--save_dtype"))
    if dropped:
        notes.append(f"{dropped:,} pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop).")
    if unmeasured:
        notes.append(
            f"{unmeasured:,} held-out pairs are longer than {limit:,} tokens and were dropped (--long_pairs drop)."
        )
    if held_out:
        notes.append(f"Accuracy is measured on {len(held_out):,} other pairs.")
    if seen:
        notes.append(f"Careful: {seen:,} prompts of --eval_data are trained on too, so the accuracy is flattering.")
    classifier = _classifier(loaded, config)
    checkpoint = open_trainer_folder(config, COMMAND, notes)
    trainer = _Trainer(
        model=classifier,
        args=_arguments(config, loaded),
        train_dataset=Dataset.from_list(encoded),
        processing_class=loaded.tokenizer,
    )
    run_trainer(trainer, folder, checkpoint, notes, quiet=quiet)
    if trainer.is_world_process_zero():
        measured: PairAccuracy | None = None

        def texts(saved: Saved) -> dict[str, str]:
            nonlocal measured
            # Measured before the folder is complete: an interrupted training must not look finished.
            measured = _measure_model(saved.model, loaded, held_out)
            metrics = _metrics(
                config, len(encoded), trainer.state.global_step, mean_of(trainer, "loss"), measured, seen
            )
            card = _card(config, metrics, measured, saved_facts(loaded, saved))
            return {"README.md": card, "metrics.json": json.dumps(metrics, indent=2) + "\n"}

        probe = ScoreProbe(loaded, [pair[side] for pair in encoded[:TEXTS] for side in ("chosen_ids", "rejected_ids")])
        saved = save_trained(trainer, config, loaded, probe, texts)
        if not quiet:
            print(saved.sentence)
            say_done(trainer, folder, _how_good(measured, mean_of(trainer, "accuracy")))
    return folder


class _Trainer(OrderByEpoch, RewardTrainer):
    """TRL's trainer, dealing the pairs in an order that a resumed training repeats."""


def pair_accuracy(model: RewardModel, pairs: Sequence[PreferencePair]) -> PairAccuracy:
    """Score both answers of each pair as training with this reward model would, and count who wins.

    Raises:
        RewardError: a text is longer than the model reads.
        ValueError: no pairs.
    """
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
    config: RewardModelConfig, tokenizer: Any, notes: list[str] | None = None
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs to train on, in random order, and those to measure on."""
    pairs = read_preferences(config, tokenizer, notes=notes)
    if config.eval_data is not None:
        held_out = read_preferences(config, tokenizer, config.eval_data, notes)
    else:
        pairs, held_out = split_by_prompt(pairs, config.held_out, config.seed)
    return subset(pairs, config.num_pairs, config.seed), held_out


def _encode(pair: PreferencePair, tokenizer: Any) -> dict[str, list[int]]:
    return {
        name: encode_answered(pair.prompt, _without_end(answer, tokenizer.eos_token), tokenizer)
        for name, answer in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected))
    }


def _length(ids: dict[str, list[int]]) -> int:
    return max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))


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


def _arguments(config: RewardModelConfig, loaded: LoadedModel) -> TrlRewardConfig:
    with warnings.catch_warnings():
        # TRL's own default uses a name that transformers has renamed; the new one is unknown to older versions.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*checkpointing.*")
        return TrlRewardConfig(
            **trainer_arguments(config, loaded, learning_rate(config)),
            **BY_LENGTH,
            max_length=None,  # encode_all has seen to it
            disable_dropout=True,
            center_rewards_coefficient=config.center_rewards or None,
        )


def learning_rate(config: RewardModelConfig) -> float:
    """The peak learning rate: the one given, else TRL's recommendation."""
    if config.learning_rate is not None:
        return config.learning_rate
    return 1e-3 if config.lora.r > 0 else 1e-4


@working("measuring on held-out pairs")
def _measure_model(model: Any, loaded: LoadedModel, pairs: Sequence[PreferencePair]) -> PairAccuracy | None:
    if not pairs:
        return None
    model.eval()
    return pair_accuracy(RewardModel("trained", model, loaded.tokenizer, loaded.context_length()), pairs)


def _how_good(measured: PairAccuracy | None, training: float | None) -> str:
    """The accuracy on held-out pairs; without them, that it was measured on none."""
    if measured is not None:
        return f"accuracy {measured.accuracy} on {measured.pairs:,} held-out pairs"
    trained_on = "" if training is None else f"; {training:.3f} in training"
    return f"accuracy not measured, no pairs were held out{trained_on}"


def _metrics(
    config: RewardModelConfig,
    pairs: int,
    steps: int,
    loss: float | None,
    measured: PairAccuracy | None,
    seen: int,
) -> dict[str, Any]:
    """What ``metrics.json`` holds."""
    metrics: dict[str, Any] = {"pairs": pairs, "steps": steps, "loss": loss}
    if measured is not None:
        metrics["held_out"] = {
            "accuracy": asdict(measured.accuracy),
            "pair_accuracy": measured.pair_accuracy,
            "margin": measured.margin,
            "pairs": measured.pairs,
            "prompts": measured.prompts,
            "prompts_also_trained_on": seen,
            "data": config.eval_data or config.data.path,
        }
    return metrics


def _card(config: RewardModelConfig, metrics: dict[str, Any], measured: PairAccuracy | None, saved: str) -> str:
    accuracy = "Not measured: no pairs were held out."
    if measured is not None:
        source = f"`{config.eval_data}`" if config.eval_data else "prompts kept out of training"
        accuracy = (
            f"{measured.accuracy} (mean over {measured.prompts:,} prompts, 95 % bootstrap interval over prompts), on "
            f"{measured.pairs:,} pairs of {source}; {measured.pair_accuracy:.3f} of all pairs. Chance is 0.5."
        )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [cagsr, reward-model, trl]
---

# {Path(config.output_dir).name}

A reward model from `{config.model.path}` with `cagsr reward-model` {__version__} (TRL's RewardTrainer).

- Held-out accuracy: {accuracy}
- Data: {metrics["pairs"]:,} preference pairs from `{config.data.path}`.
- {metrics["steps"]:,} steps of {config.batch_size} pairs, peak learning rate {learning_rate(config):g}, seed {config.seed}.
- It reads prompt and answer as one text, without an end token: `cagsr train --reward.models` gives it just that.
{saved}
- All settings: `{settings_file(COMMAND)}`.

## Limits

It knows the preferences of its pairs and nothing else: answers unlike those pairs get scores that mean little, and a policy
trained against it will find them.
"""
