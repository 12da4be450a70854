"""A user's own functions by dotted path: terms of ours and TRL's, and what is said when they can't be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from cagsr.commands.main import main
from cagsr.config import GroundedCoverageConfig, RepetitionConfig, RewardConfig
from cagsr.errors import ConfigError, RewardError
from cagsr.flow import RewardBatch
from cagsr.reward.build import build_reward
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.registry import Resources
from cagsr.reward.term import PartialValues
from cagsr.reward.terms.echo import EchoConfig
from cagsr.reward.user_functions import load_function
from cagsr.support.dotted_path import import_dotted

MakeBatch = Callable[..., RewardBatch]

OFF = {
    "grounded_coverage": GroundedCoverageConfig(weight=0.0),
    "repetition": RepetitionConfig(weight=0.0),
    "normalize": "none",
}
"""Of the default reward only the guard is left."""

MODULE = """
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cagsr.reward.registry import TermConfig

if TYPE_CHECKING:
    from pathlib import Path

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

@dataclass(frozen=True)
class WithSettingsConfig:
    factor: float = 2.0
    most: int | None = None
    words: tuple[str, ...] = ("answer",)

class WithSettings:
    name = "with_settings"
    needs = frozenset()
    settings: "WithSettingsConfig"
    seen: "Path"  # imported for type checkers alone

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, batch):
        said = [sum(text.count(word) for word in self.settings.words) for text in batch.episodes.completions]
        values = torch.tensor(said) * self.settings.factor
        return values if self.settings.most is None else values.clamp(max=self.settings.most)

class Inherits(WithSettings):
    name = "inherits"

class NeedsOne:
    name = "needs_one"
    settings: "NeedsOneConfig"

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, batch):
        return torch.full((len(batch.episodes.completions),), self.settings.size)

@dataclass(frozen=True)
class WeighedConfig(TermConfig):
    factor: float = 2.0

class Weighed(WithSettings):
    name = "weighed"
    settings: WeighedConfig

@dataclass
class NeedsOneConfig:
    size: float

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
        grounded_coverage=GroundedCoverageConfig(weight=0.0),
        repetition=RepetitionConfig(weight=0.0),
        echo=EchoConfig(weight=0.0),
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
        build_reward(RewardConfig(**OFF, functions=[path]), device="cpu")
    with pytest.raises(ConfigError, match="its term is named 'my_term', as another one"):
        build_reward(
            RewardConfig(**OFF, functions=["user_rewards_for_test.Term", "user_rewards_for_test.instance"]),
            device="cpu",
        )


def test_nan_of_a_function_is_an_error_and_none_is_not(module: Any, make_reward_batch: MakeBatch) -> None:
    config = RewardConfig(**OFF, functions=["user_rewards_for_test.nan"])
    with pytest.raises(RewardError, match="'nan' gave nan for the prompt of row 1"):
        build_reward(config, device="cpu")(make_reward_batch())


# --- settings of a user's own term


def valued(batch: RewardBatch, names: list[str], *settings: str) -> list[float]:
    """What a reward of these functions alone gives."""
    functions = [f"user_rewards_for_test.{name}" for name in names]
    config = RewardConfig(**OFF, functions=functions, function_settings=list(settings))
    return build_reward(config, device="cpu")(batch).total.tolist()


def test_a_class_takes_its_settings_by_name(module: Any, make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=2)
    batch = replace(batch, episodes=replace(batch.episodes, completions=("answer answer", "answer more")))
    assert valued(batch, ["WithSettings"]) == [4.0, 2.0]
    assert valued(batch, ["WithSettings"], "WithSettings.factor=0.5") == [1.0, 0.5]
    assert valued(batch, ["WithSettings"], "user_rewards_for_test.WithSettings.most=3") == [3.0, 2.0]
    assert valued(batch, ["WithSettings"], "WithSettings.factor=3", "WithSettings.words=[more, a]") == [6.0, 6.0]
    # YAML reads 1e-1 as text and ~ as nothing; a value may hold the sign itself.
    assert valued(batch, ["WithSettings"], "WithSettings.factor=1e-1", "WithSettings.most=~") == pytest.approx(
        [0.2, 0.1]
    )
    assert valued(batch, ["WithSettings"], "WithSettings.words=['=']") == [0.0, 0.0]
    # Of two classes each takes its own; one that inherits its settings has them too.
    assert valued(batch, ["WithSettings", "Inherits"], "Inherits.factor=0") == [4.0, 2.0]
    assert valued(batch, ["NeedsOne", "Term"], "NeedsOne.size=0.25") == [1.25, 1.25]


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (["WithSettings"], "WithSettings.facotr=1", r"has no setting 'facotr'; it has \['factor', 'most', 'words'\]"),
        (["WithSettings"], "WithSettings.factor=much", r"factor .*number.*'much'"),
        (["WithSettings"], "WithSettings.factor=true", r"factor .*(true or false|number).*True"),
        (["WithSettings"], "WithSettings.factor=.nan", r"factor nan: must be a finite number"),
        (["WithSettings"], "WithSettings.most=1.5", r"most .*integer.*1\.5"),
        (["WithSettings"], "WithSettings.words={a: 1}", r"words .*"),
        (["WithSettings"], "WithSettings.words=[a", r"'WithSettings.words=\[a'.*YAML"),
        (
            ["WithSettings"],
            "factor=1",
            r"'factor=1': write name\.key=value, the name being one of \['WithSettings', 'user_r",
        ),
        (["WithSettings"], "WithSettings.factor", r"'WithSettings.factor': write name\.key=value"),
        (["WithSettings"], "Another.factor=1", r"'Another.factor=1': write name\.key=value"),
        (
            ["Weighed"],
            "Weighed.weight=2",
            r"the weight of 'user_rewards_for_test.Weighed' is given by reward\.function_weights",
        ),
        (["Term"], "Term.factor=1", r"'user_rewards_for_test.Term' has no settings"),
        (["on_batch"], "on_batch.factor=1", r"'user_rewards_for_test.on_batch' is no class, so it takes no settings"),
        (["trl"], "trl.factor=1", r"'user_rewards_for_test.trl' is no class"),
        (["instance"], "instance.factor=1", r"'user_rewards_for_test.instance' is no class"),
    ],
)
def test_settings_that_can_not_be_used_are_one_sentence(
    module: Any, names: list[str], given: str, words: str, make_reward_batch: MakeBatch
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        valued(make_reward_batch(), names, given)
    said = str(caught.value)
    assert said.startswith("reward.function_settings")
    assert "\n" not in said


def test_a_class_whose_settings_have_no_default_names_what_is_missing(module: Any) -> None:
    with pytest.raises(ConfigError, match=r"class 'user_rewards_for_test.NeedsOne' can't be made .*'size'"):
        load("NeedsOne")


def test_settings_of_nothing_are_refused(make_reward_batch: MakeBatch) -> None:
    """Not left unread: a setting of a term that the reward does not have is a slip."""
    with pytest.raises(ConfigError, match=r"'WithSettings.factor=1': write name\.key=value"):
        build_reward(RewardConfig(function_settings=["WithSettings.factor=1"]), device="cpu")


def test_settings_on_the_command_line(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save_model(tmp_path / "start")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "tell me about the cat", "completion": "a cat sees a cat"}\n')
    line = [
        "score",
        "--model",
        str(model),
        "--model.device",
        "cpu",
        "--data",
        "pairs.jsonl",
        "--output",
        "scores.jsonl",
    ]
    line += ["--reward.functions", "user_rewards_for_test.WithSettings", "--reward.function_settings"]
    assert main([*line, "WithSettings.factor=10", "WithSettings.words=[cat]"]) == 0
    assert json.loads((tmp_path / "scores.jsonl").read_text())["terms"]["with_settings"] == 20.0
    (tmp_path / "scores.jsonl").unlink()
    capsys.readouterr()
    assert main([*line, "WithSettings.facotr=10"]) == 2
    said = capsys.readouterr().err
    assert "has no setting 'facotr'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_class_gets_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_reward_batch: MakeBatch
) -> None:
    """As a built-in one: what each token says, and associations, which the run then learns or reads."""
    (tmp_path / "needy_terms.py").write_text(
        "class Needy:\n"
        '    name = "needy"\n'
        '    needs = frozenset({"texts", "associations"})\n'
        "    def __init__(self, texts, associations):\n"
        "        self.held = (texts, associations)\n"
        "    def __call__(self, batch):\n"
        "        return batch.episodes.ids.new_zeros(len(batch.episodes.ids)).float()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardConfig(**OFF, functions=["needy_terms.Needy"])
    assert config.needs("associations")
    assert not RewardConfig().needs("associations")
    assert not RewardConfig(functions=["needy_terms.Needy"], function_weights=[0.0]).needs("associations")
    texts, associations = object(), object()
    resources = Resources(texts, associations)  # type: ignore[arg-type]
    (term,) = [one for one in build_reward(config, device="cpu", resources=resources).terms if one.name == "needy"]
    assert term.held == (texts, associations)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"needy_terms\.Needy needs associations, and none were given"):
        build_reward(config, device="cpu")


def test_a_need_that_nobody_has_is_a_slip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slipping_terms.py").write_text(
        'class Slip:\n    name, needs = "slip", frozenset({"text"})\n    def __call__(self, batch):\n        return None\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"slipping_terms\.Slip needs 'text', which there is not; .*'texts'"):
        build_reward(RewardConfig(**OFF, functions=["slipping_terms.Slip"]), device="cpu")
