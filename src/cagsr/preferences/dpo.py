"""Direct preference optimisation on TRL's DPOTrainer: preference pairs without a reward model and without sampling."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from cagsr.config import DpoConfig
from cagsr.models.load import LoadedModel, load_model
from cagsr.pairs import encode_answer, unending
from cagsr.preferences.pairs import (
    TRAINER_ARGUMENTS,
    OrderByEpoch,
    PreferencePair,
    encode_within_limit,
    read_preferences,
    subset,
)
from cagsr.prompts.encode import TextEncoder, encode_prompt
from cagsr.runs.saved import TEXTS, Saved, answers_probe
from cagsr.runs.trl_training import Outcome, Training, mean_of, train_with_trl


def train_dpo(config: DpoConfig, *, quiet: bool = False) -> Path:
    """Train a decoder-only model on preference pairs with DPO (Rafailov et al., 2023, equation 7) and save it.

    Prompts and answers are encoded as ``cagsr sft`` encodes them, each answer ended by the end token. With LoRA the
    reference is the model with its adapter off, the saved model is the merged one and ``adapter/`` holds the adapter.
    The rest as ``train_with_trl``.
    """
    return train_with_trl(config, "dpo", lambda config: load_model(config.model, config.lora), _prepare, quiet=quiet)


def _prepare(config: DpoConfig, loaded: LoadedModel, limit: int | None) -> Training:
    read: list[str] = []
    pairs = subset(read_preferences(config, loaded.tokenizer, notes=read), config.num_pairs, config.seed)
    encoder = TextEncoder(loaded.tokenizer)
    rows = [row for _, row in encode_within_limit(pairs, lambda pair: _encode(pair, encoder, config), config, limit)]
    answers = [row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]

    def describe(trainer: Any, saved: Saved) -> Outcome:
        fact = f"Data: {len(rows):,} preference pairs from `{config.data.path}`; beta {config.beta:g}."
        accuracy = mean_of(trainer, "rewards/accuracies")
        return Outcome([fact], [] if accuracy is None else [f"{accuracy:.0%} of the pairs ranked right"])

    return Training(
        # With LoRA TRL switches the adapter off instead; without, it would read the start from its folder once more.
        trainer=partial(_Trainer, loaded.model, ref_model=None if loaded.lora else copy.deepcopy(loaded.model)),
        arguments=partial(
            TrlDpoConfig,
            **TRAINER_ARGUMENTS,
            beta=config.beta,
            loss_type=[config.loss_type],
            label_smoothing=config.label_smoothing,
        ),
        rows=rows,
        dropped=len(pairs) - len(rows),
        notes=[*read, *unending(answers, loaded.stop_ids)],
        probe=answers_probe(loaded, [(row["prompt_ids"], row["chosen_ids"]) for row in rows[:TEXTS]]),
        describe=describe,
        what=f"Direct preference optimisation from `{config.model.path}`",
        library="TRL's DPOTrainer",
        limits="The model was not evaluated here: see `cagsr diagnose`.",
    )


class _Trainer(OrderByEpoch, DPOTrainer):
    """TRL's trainer on pairs that are tokens already: its own encoding would differ from what a rollout sees."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _encode(pair: PreferencePair, encoder: TextEncoder, config: DpoConfig) -> dict[str, Any]:
    prompt = list(encode_prompt(pair.prompt, encoder).ids)
    columns = (config.chosen_column, config.rejected_column)
    # That the columns are there has been seen to: no message needs their flags.
    chosen, rejected = (encode_answer(pair.prompt, column, encoder, pair.where) for column in columns)
    length = len(prompt) + max(len(chosen), len(rejected))
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}
