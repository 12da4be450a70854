"""How often a saved reward model prefers the chosen answer: ``python -m examples.e2e.accuracy MODEL PAIRS``."""

from __future__ import annotations

import sys

from cagsr.config import DataConfig, ModelConfig, RewardModelConfig
from cagsr.preferences.pairs import read_preferences
from cagsr.preferences.reward_trainer import PairAccuracy, pair_accuracy
from cagsr.reward.model import load_reward_model


def accuracy(model: str, pairs: str) -> PairAccuracy:
    """Measure a saved reward model on a file of preference pairs with the usual columns.

    Raises:
        CagsrError: a model or file that can't be used.
    """
    loaded = load_reward_model(model, "cpu")
    config = RewardModelConfig(ModelConfig(model), DataConfig(pairs), output_dir="")
    return pair_accuracy(loaded, read_preferences(config, loaded.tokenizer))


if __name__ == "__main__":
    print(accuracy(*sys.argv[1:]))
