"""Every setting holds to what its type says, whether it comes by a flag, from a file or from Python."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from cagsr.commands.main import COMMANDS, part_of
from cagsr.config import (
    CorruptionConfig,
    DataConfig,
    DpoConfig,
    EvalConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    SynthesizeConfig,
    TrainConfig,
    validate,
)
from cagsr.config.validation import bounds, checked, flatten, leaf_types, types_of
from cagsr.errors import ConfigError
from cagsr.parse import parse_command

VALUES: dict[str, Any] = {
    **{"model.path": "m", "data.path": "d", "output_dir": "o", "output": "out.jsonl", "plan": "plan.yaml"},
    **{"runs": ["run"]},
}
"""For the settings that have no default."""
CONFIGS = {name: part_of(name, "config") for name in COMMANDS}
COUNTS = {"train": 45, "sft": 14, "dpo": 17, "quickstart": 7, "eval": 10}
"""How many settings of a command state a range, at least."""


def _types(kind: Any) -> Iterator[Any]:
    yield kind
    for one in get_args(kind):
        yield from _types(one)


def _outside(kind: Any) -> list[float]:
    """The values nearest to a type's bounds that it does not allow, and for floats what is not finite."""
    whole = int in _types(kind)
    found: list[float] = []
    for name, at in bounds(kind).items():
        down = name in ("ge", "gt")
        step = at - 1 if down else at + 1
        near = step if whole else math.nextafter(at, -math.inf if down else math.inf)
        found.append(at if name in ("gt", "lt") else near)
    return found + ([math.nan, math.inf] if float in _types(kind) else [])


def _bad_values() -> Iterator[Any]:
    seen = set()
    for command, config_class in CONFIGS.items():
        for key, kind in leaf_types(config_class):
            if (key, kind) not in seen:  # commands share sections
                seen.add((key, kind))
                for value in _outside(kind):
                    yield pytest.param(command, key, value, id=f"{command}-{key}-{value}")


def _config(config_class: Any, **given: Any) -> Any:
    """An instance, from dotted keys."""
    values = {}
    for name, kind in types_of(config_class).items():
        if dataclasses.is_dataclass(kind):
            inner = {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{name}.")}
            values[name] = _config(kind, **inner)
        elif name in given:
            values[name] = given[name]
    return config_class(**values)


def _needed(config_class: Any) -> dict[str, Any]:
    kinds = dict(leaf_types(config_class))
    modes = {"mode": get_args(kinds["mode"])[0]} if "mode" in kinds else {}
    return {key: value for key, value in VALUES.items() if key in kinds} | modes


@pytest.mark.parametrize(("command", "key", "value"), _bad_values())
def test_a_value_just_outside_its_range_is_refused_however_it_comes(command: str, key: str, value: float) -> None:
    config_class, needed = CONFIGS[command], _needed(CONFIGS[command])
    listed = list in {getattr(one, "__origin__", None) for one in _types(dict(leaf_types(config_class))[key])}
    with pytest.raises(ConfigError) as from_python:
        validate(_config(config_class, **{**needed, key: [value] if listed else value}))
    words = [word for name, one in needed.items() for word in (f"--{name}", one[0] if isinstance(one, list) else one)]
    with pytest.raises(ConfigError) as from_flags:
        parse_command(config_class, [*words, f"--{key}", repr(value)], prog="cagsr")
    sentence = str(from_python.value)
    assert re.fullmatch(rf"--{re.escape(key)} {re.escape(str(value))}: must (be|lie) [^\n]+\.", sentence), sentence
    assert str(from_flags.value) == sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_the_ranges_are_stated_and_the_defaults_within_them(command: str) -> None:
    kinds = dict(leaf_types(CONFIGS[command]))
    assert sum(bool(bounds(kind)) for kind in kinds.values()) >= COUNTS.get(command, 0)
    for key, value in flatten(_config(CONFIGS[command], **_needed(CONFIGS[command]))).items():
        checked(kinds[key], value, key, strict=True)


def test_a_file_s_value_out_of_range_names_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("sampling: {top_p: 0}\n")
    with pytest.raises(ConfigError) as refused:
        parse_command(TrainConfig, ["--config", str(file)], prog="cagsr train")
    assert str(refused.value) == f"{file}: 'sampling.top_p' 0: must be above 0, up to 1."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": "3"}, "--seed should be a valid integer (it is '3')"),
        ({"seed": True}, "--seed should be a valid integer (it is True)"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler should be 'constant', 'linear' or 'cosine' (it is 'cosin')"),
        ({"output_dir": None}, "--output_dir should be a valid string (it is None)"),
    ],
)
def test_python_s_values_are_not_converted(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(dataclasses.replace(SftConfig(ModelConfig("m"), DataConfig("d"), "o"), **change))
    assert str(refused.value) == sentence


TRAIN = TrainConfig(ModelConfig("m"), DataConfig("d"), "o")
SFT = SftConfig(ModelConfig("m"), DataConfig("d"), "o")
DPO = DpoConfig(ModelConfig("m"), DataConfig("d"), "o")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            dataclasses.replace(TRAIN, sampling=SamplingConfig(temperature=0.0)),
            ["--sampling.temperature 0.0", "above 0"],
        ),
        (
            dataclasses.replace(TRAIN, sampling=SamplingConfig(min_new_tokens=9, max_new_tokens=8)),
            ["--sampling.min_new_tokens 9: must lie between 0 and sampling.max_new_tokens 8."],
        ),
        (
            dataclasses.replace(TRAIN, sampling=SamplingConfig(num_generations=1), ppo=PPOConfig(estimator="rloo")),
            ["--ppo.estimator rloo", "sampling.num_generations must be 2"],
        ),
        (
            dataclasses.replace(TRAIN, sampling=SamplingConfig(num_generations=1)),
            ["--reward.normalize within_prompt", "--reward.normalize running"],
        ),
        (dataclasses.replace(TRAIN, ppo=PPOConfig(num_mini_batches=65)), ["--ppo.num_mini_batches 65", "answers"]),
        (dataclasses.replace(TRAIN, ppo=PPOConfig(kl_in="loss")), ["--ppo.kl_in loss", "--ppo.kl_estimator k3"]),
        (dataclasses.replace(TRAIN, ppo=PPOConfig(kl_controller="adaptive", kl_coef=0.0)), ["--ppo.kl_coef 0"]),
        (
            dataclasses.replace(TRAIN, rollout=RolloutConfig(engine="vllm", url="localhost:8000")),
            ["--rollout.url", "http://"],
        ),
        (dataclasses.replace(TRAIN, evaluation=EvalConfig(path="p", held_out=0)), ["--evaluation.held_out 0"]),
        (
            dataclasses.replace(SFT, batch_size=8, micro_batch_size=3),
            ["--micro_batch_size 3 must divide --batch_size 8"],
        ),
        (dataclasses.replace(SFT, micro_batch_size=64), ["--micro_batch_size 64 must divide --batch_size 32"]),
        (dataclasses.replace(SFT, resume=True, overwrite=True), ["--resume", "--overwrite"]),
        (dataclasses.replace(SFT, data=DataConfig("d", streaming=True)), ["--data.streaming", "--data.limit"]),
        (dataclasses.replace(DPO, data=DataConfig("d", streaming=True)), ["--data.streaming", "--data.limit"]),
        (dataclasses.replace(DPO, data=DataConfig("d", split_text=0.5)), ["--data.split_text"]),
        (SynthesizeConfig(DataConfig("d"), "o", corruption=CorruptionConfig(*[0.0] * 6)), ["--corruption"]),
        (SynthesizeConfig(DataConfig("d", streaming=True), "o"), ["--data.streaming"]),
        (
            SynthesizeConfig(DataConfig("d"), "/nowhere/o.jsonl"),
            ["--output /nowhere/o.jsonl: the folder /nowhere does"],
        ),
        (SynthesizeConfig(DataConfig("d"), "/"), ["--output /: is a folder; give the name of a file."]),
    ],
)
def test_settings_that_do_not_go_together(config: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


def test_what_goes_together_is_let_through() -> None:
    validate(dataclasses.replace(TRAIN, rollout=RolloutConfig(url="not looked at without vLLM")))
    validate(dataclasses.replace(TRAIN, ppo=PPOConfig(num_mini_batches=64)))
    validate(dataclasses.replace(TRAIN, ppo=PPOConfig(kl_coef=0.0)))
    validate(dataclasses.replace(SFT, batch_size=9, micro_batch_size=3, data=DataConfig("d", split_text=0.5)))


def test_the_trainers_share_what_they_share_and_differ_in_what_is_documented() -> None:
    assert (SFT.epochs, CONFIGS["reward-model"](ModelConfig("m"), DataConfig("d"), "o").epochs) == (1.0, 3.0)
    scratch = dataclasses.replace(SFT, from_scratch=True)
    lora = dataclasses.replace(SFT, lora=dataclasses.replace(SFT.lora, r=2))
    assert [one.peak_learning_rate for one in (SFT, scratch, lora, DPO)] == [2e-5, 1e-3, 2e-4, 1e-6]
    assert dataclasses.replace(lora, learning_rate=0.5).peak_learning_rate == 0.5
    assert RunConfig().seed == SFT.seed == 0
