"""The reward that a training run used, with what it learned: settings, IDF table, associations, scales."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cagsr.config import AttentionConfig, RewardConfig, SalienceConfig, TrainConfig
from cagsr.config.validation import flatten
from cagsr.errors import ConfigError, RunError
from cagsr.parse import parse_command
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.normalize import Normalizer
from cagsr.reward.registry import COSTLY
from cagsr.reward.settings import TERMS
from cagsr.reward.weigh import Scales
from cagsr.runs.checkpoint import latest_checkpoint, load_tree
from cagsr.runs.folder import ASSOCIATIONS, CONFIG, FREQUENCY, PROBE, SCALES, flat_tree, lacking
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import say

JudgingT = TypeVar("JudgingT")
"""The settings of a command that judges answers: a dataclass with ``reward_from``, ``reward``, ``attention``, ``salience``."""
_SECTIONS = ("reward", "attention", "salience")


@dataclass(frozen=True)
class RunReward:
    """What everything needs that judges answers by a run's reward."""

    reward: RewardConfig
    """With the path of the run's associations, where it has some."""
    attention: AttentionConfig
    salience: SalienceConfig
    temperature: float
    """That the logits were divided by, for self-certainty."""
    frequency: DocumentFrequency
    scales: Scales | None
    """None: the reward takes raw values (``reward.normalize none``)."""


def read_run_reward(run: str) -> RunReward:
    """Read the reward of a training run, finished or not; RunError or ConfigError where something is missing or unreadable."""
    folder = Path(run)
    if not (folder / CONFIG).is_file():
        raise RunError(f"--reward_from {run}: there is no {CONFIG} in it; name the folder of a cagsr train run.")
    config: TrainConfig = parse_command(TrainConfig, ["--config", str(folder / CONFIG), *_older(folder)], prog=CONFIG)
    reward = config.reward
    if config.steps.by != "none":
        say(
            f"{run} judged the steps of answers (--steps.by {config.steps.by}); whole answers are judged here, on the scales "
            "that it learned of steps."
        )
    if reward.needs("associations") and reward.associations.path is None:
        path = str(folder / ASSOCIATIONS)
        reward = dataclasses.replace(reward, associations=dataclasses.replace(reward.associations, path=path))
    if reward.needs("support") and reward.probe.path is None:
        reward = dataclasses.replace(reward, probe=dataclasses.replace(reward.probe, path=str(folder / PROBE)))
    try:
        frequency = DocumentFrequency.from_json(_read(folder, FREQUENCY))
    except (OSError, ValueError) as error:
        raise RunError(
            f"--reward_from {run}: {FREQUENCY} is missing or can't be read; go on with the run (--resume), which writes it."
        ) from error
    scales = None if reward.normalize == "none" else _scales(run, reward)
    return RunReward(reward, config.attention, config.salience, config.sampling.temperature, frequency, scales)


def _older(folder: Path) -> list[str]:
    """Flags for what an older run did where its settings say nothing of it."""
    try:
        given = flat_tree(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return []  # whoever reads the settings says what is wrong with the file
    return [part for key, value in lacking(given).items() for part in (f"--{key}", str(value))]


def _scales(run: str, reward: RewardConfig) -> Scales:
    """The scales that a run has left, or those of its last checkpoint: older runs left none."""
    folder = Path(run)
    try:
        if (folder / SCALES).is_file():
            moments = _read(folder, SCALES)
        else:
            latest = latest_checkpoint(folder / "checkpoints").path
            if latest is None:
                raise RunError(
                    f"--reward_from {run}: it has neither {SCALES} nor a checkpoint; a run has its scales from the first "
                    "checkpoint on."
                )
            moments = load_tree(latest / "extra")["ppo"]["reward"]
        Normalizer(list(moments), reward.normalize).load_state_dict(moments)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"--reward_from {run}: the scales in it can't be read ({type(error).__name__}).") from error
    return Scales(run, moments)


def with_run_reward(config: JudgingT, temperature: float) -> tuple[JudgingT, RunReward | None]:
    """Put the reward of the run that ``--reward_from`` names into a command's settings; unchanged without one.

    ``temperature`` is what the command divides logits by.

    Raises:
        RunError: no run, or one that has learned no scales yet.
        ConfigError: settings were given that are neither the defaults nor the run's, or another temperature where
            a term is paid that depends on it.
    """
    name: str | None = vars(config)["reward_from"]
    if name is None:
        return config, None
    learned = read_run_reward(name)
    for section in _SECTIONS:
        given, run = flatten(getattr(config, section)), flatten(getattr(learned, section))
        default = flatten(type(getattr(config, section))())
        for key, value in given.items():
            # There is one model here: whose attention is read is no choice.
            if f"{section}.{key}" != "attention.source" and value not in (default[key], run[key]):
                raise ConfigError(
                    f"--{section}.{key} {value}: the reward is that of the run {name}, where it is {run[key]}; "
                    "leave one of the two flags out."
                )
    tempered = [one.name for one in TERMS if one.name == "self_certainty" or COSTLY & one.needs]
    paid = [one for one in tempered if getattr(learned.reward, one).weight != 0]
    if paid and temperature != learned.temperature:
        raise ConfigError(
            f"The run {name} pays {paid[0]} at temperature {learned.temperature:g} and this is "
            f"{temperature:g}: give the run's temperature."
        )
    changed: Any = config
    return dataclasses.replace(changed, **{section: getattr(learned, section) for section in _SECTIONS}), learned


def write_scales(folder: Path, moments: Mapping[str, Mapping[str, float]]) -> None:
    """Keep the scales that a run's reward has learned so far."""
    write_text_atomically(folder / SCALES, json.dumps(moments, indent=1))


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))
