"""A user's own functions by dotted path: terms of ours and TRL's, and what is said when they can't be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cagsr.config import CoverageConfig, RepetitionConfig, RewardConfig
from cagsr.errors import ConfigError, RewardError
from cagsr.flow import RewardBatch
from cagsr.reward.build import build_reward
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.term import PartialValues
from cagsr.support.dotted_path import import_dotted, load_function

MakeBatch = Callable[..., RewardBatch]

MODULE = """
import torch

seen = {}

def trl(prompts, completions, completion_ids, **columns):
    seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
    return [None if answer else 1 for answer in columns["answer"]]

def trl_without_kwargs(completions, answer):
    return [float(a) + 0.5 for a in answer]

def trl_only_kwargs(**kwargs):
    return torch.arange(len(kwargs["completions"]))

def trl_unknown_column(completions, solution, weight=2.0):
    return [0.0] * len(completions)

def too_few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good" for _ in completions]

def nan(completions, **kwargs):
    return [float("nan") for _ in completions]

def raises(completions, **kwargs):
    return {}["missing"]

def on_batch(batch):
    return batch.readings.entropy

def coverage(batch):
    return batch.episodes.sampled.sum(1)

def without_attention(batch):
    return batch.readings.entropy

without_attention.needs = frozenset()

def two_things(a, b):
    return 0

async def coroutine(batch):
    return [1.0]

class Term:
    name = "my_term"
    def __call__(self, batch):
        return torch.ones(len(batch.episodes.completions))

class Lean(Term):
    needs = frozenset()

class NeedsArguments:
    name = "x"
    def __init__(self, size):
        self.size = size
    def __call__(self, batch):
        return 0

class NamedAsAnother(Term):
    name = "length"

instance = Term()
number = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of reward functions in the current directory, found by its name alone."""
    (tmp_path / "user_rewards_for_test.py").write_text(MODULE)
    (tmp_path / "user_rewards_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "user_rewards_raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield lambda: sys.modules["user_rewards_for_test"]
    for name in ("user_rewards_for_test", "user_rewards_broken", "user_rewards_raising"):
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    return load_function(f"user_rewards_for_test.{name}")


def test_a_trl_function_gets_what_trl_passes(module: Any, make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=2, generations=2)
    values = load("trl")(batch)
    assert isinstance(values, PartialValues)
    assert values.applies.tolist() == [True, True, False, False]
    assert values.values[:2].tolist() == [1.0, 1.0]
    seen = module().seen
    assert seen["prompts"] == ["prompt 1", "prompt 1", "prompt 2", "prompt 2"]
    assert seen["completions"] == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert seen["columns"].pop("answer") == [0, 0, 1, 1]  # repeated for each candidate
    assert set(seen["columns"]) == {"trainer_state", "log_metric", "log_extra"}
    lengths = batch.episodes.sampled.sum(1).tolist()
    assert seen["completion_ids"] == [ids[:n].tolist() for ids, n in zip(batch.episodes.ids, lengths, strict=True)]


def test_conversational_prompts_go_as_messages(module: Any, make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=2)
    chat = ({"role": "user", "content": "hi"},)
    prompts = tuple(replace(prompt, messages=chat) for prompt in batch.episodes.prompts.prompts)
    batch = replace(batch, episodes=replace(batch.episodes, prompts=replace(batch.episodes.prompts, prompts=prompts)))
    load("trl")(batch)
    assert module().seen["prompts"] == [[{"role": "user", "content": "hi"}]] * 2
    assert module().seen["completions"][1] == [{"role": "assistant", "content": "answer 1"}]


def test_a_function_of_trl_itself(make_reward_batch: MakeBatch) -> None:
    pytest.importorskip("trl.rewards")
    batch = make_reward_batch(prompts=1, generations=2)
    prompts = tuple(replace(p, messages=({"role": "user", "content": "hi"},)) for p in batch.episodes.prompts.prompts)
    episodes = replace(
        batch.episodes,
        prompts=replace(batch.episodes.prompts, prompts=prompts),
        completions=("<think>\nso\n</think>\nyes", "yes"),
    )
    values = load_function("trl.rewards.think_format_reward")(replace(batch, episodes=episodes))
    assert isinstance(values, PartialValues)
    assert values.values.tolist() == [1.0, 0.0]


def test_other_signatures(module: Any, make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=2, generations=2)
    assert load("trl_without_kwargs")(batch).values.tolist() == [0.5, 0.5, 1.5, 1.5]
    assert load("trl_only_kwargs")(batch).values.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert torch.equal(load("on_batch")(batch), batch.readings.entropy)
    assert load("on_batch").name == "on_batch"
    assert load("Term").name == load("instance").name == "my_term"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trl_unknown_column", r"asks for the column 'solution'.*\['answer'\]"),
        ("too_few", "1 values for 4 answers"),
        ("words", "'good'.*row 1"),
        ("raises", "failed with KeyError"),
    ],
)
def test_functions_that_fail(module: Any, make_reward_batch: MakeBatch, name: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        load(name)(make_reward_batch(prompts=2, generations=2))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_dots", "not a dotted path"),
        ("nowhere_at_all.f", "no module 'nowhere_at_all'"),
        ("user_rewards_for_test.sub.f", "user_rewards_for_test"),
        ("user_rewards_for_test.nothing", "has no 'nothing'"),
        ("user_rewards_broken.f", "imports 'a_package_that_is_not_there', which is not installed"),
        ("user_rewards_raising.f", "ZeroDivisionError"),
        ("user_rewards_for_test.number", "int, not a function"),
        ("user_rewards_for_test.two_things", r"takes \(a, b\)"),
        ("user_rewards_for_test.coroutine", "coroutine"),
        ("user_rewards_for_test.NeedsArguments", "without arguments"),
    ],
)
def test_paths_that_fail(module: Any, path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_function(path)


def test_the_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.metric"):
        import_dotted("nowhere_at_all.f", "evaluation.metric")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("trl_without_kwargs", False), ("on_batch", True), ("without_attention", False), ("Term", True), ("Lean", False)],
)
def test_only_functions_of_the_batch_have_the_attention_maps_kept(
    module: Any, make_reward_batch: MakeBatch, name: str, kept: bool
) -> None:
    """And of those only what doesn't say that it can do without."""
    visitor = TermVisitor(make_reward_batch().episodes, [load(name)], "sum")
    assert visitor.wants_attention == kept
    assert (visitor.attention() is not None) == kept


def test_functions_in_the_reward(module: Any, make_reward_batch: MakeBatch) -> None:
    config = RewardConfig(
        coverage=CoverageConfig(weight=0.0),
        repetition=RepetitionConfig(weight=0.0),
        functions=["user_rewards_for_test.trl_without_kwargs", "user_rewards_for_test.coverage"],
        function_weights=[2.0, 1.0],
        normalize="running",
    )
    reward_function = build_reward(config, device="cpu")
    # A name that is taken gives way to the whole path.
    assert reward_function.names == ("trl_without_kwargs", "user_rewards_for_test.coverage")
    reward = reward_function(make_reward_batch(prompts=2, generations=2))
    torch.testing.assert_close(reward.contributions["trl_without_kwargs"], torch.tensor([-2.0, -2.0, 2.0, 2.0]))


def test_a_term_named_like_another_is_refused(module: Any) -> None:
    path = "user_rewards_for_test.NamedAsAnother"
    with pytest.raises(ConfigError, match=f"{path}: its term is named 'length', as another one"):
        build_reward(RewardConfig(functions=[path]), device="cpu")
    with pytest.raises(ConfigError, match="its term is named 'my_term', as another one"):
        build_reward(
            RewardConfig(functions=["user_rewards_for_test.Term", "user_rewards_for_test.instance"]), device="cpu"
        )


def test_nan_of_a_function_is_an_error_and_none_is_not(module: Any, make_reward_batch: MakeBatch) -> None:
    config = RewardConfig(functions=["user_rewards_for_test.nan"])
    with pytest.raises(RewardError, match="'nan' gave nan for the prompt of row 1"):
        build_reward(config, device="cpu")(make_reward_batch())
