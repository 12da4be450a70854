"""What makes a term known: registered by a class with settings, ours or another package's; and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import apart
import tiny
from cagsr.config import RewardConfig
from cagsr.errors import ConfigError
from cagsr.flow import RewardBatch
from cagsr.reward import registry, terms
from cagsr.reward.registry import RESOURCES, Resources, TermConfig, register, registered_terms
from cagsr.reward.settings import TERMS
from cagsr.reward.term import ATTENTION, REFERENCE, SUPPORT, RewardTerm, needs_of

MakeBatch = Callable[..., RewardBatch]
ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in Path(terms.__path__[0]).glob("*.py") if path.name != "__init__.py")


@pytest.fixture(autouse=True)
def _registered_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TERMS", dict(registry._TERMS))


@dataclass(frozen=True)
class ExclamationsConfig(TermConfig):
    """Exclamation marks."""

    most: int = 3
    """More than these count no more."""


@dataclass(frozen=True)
class Exclamations:
    name: ClassVar[str] = "exclamations"
    needs: ClassVar[frozenset[str]] = frozenset()
    settings: ExclamationsConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        return torch.tensor([min(text.count("!"), self.settings.most) for text in batch.episodes.completions])

    @staticmethod
    def advice(settings: ExclamationsConfig, reward: RewardConfig) -> list[str]:
        return ["loud"] if settings.weight > 0 else []


# --- registered by a class


def test_a_term_is_its_class_with_its_settings(make_reward_batch: MakeBatch) -> None:
    assert register(Exclamations) is Exclamations  # the class stays what it is
    found = {term.name: term for term in registered_terms()}["exclamations"]
    assert (found.config, found.needs) == (ExclamationsConfig, frozenset())
    assert found.config().weight == 0.0
    batch = make_reward_batch(prompts=1, generations=2)
    batch = dataclasses.replace(batch, episodes=dataclasses.replace(batch.episodes, completions=("a!!!!!", "b!")))
    term = found.term(ExclamationsConfig(most=4), Resources())
    assert isinstance(term, RewardTerm)
    assert term(batch).tolist() == [4, 1]
    assert list(found.advice(ExclamationsConfig(weight=1.0), RewardConfig())) == ["loud"]
    # Ours come first, in their places; others after them, by name.
    assert [term.name for term in registered_terms()] == [*(term.name for term in TERMS), "exclamations"]


def test_what_a_term_needs_is_handed_to_it() -> None:
    @dataclass(frozen=True)
    class Listens:
        name: ClassVar[str] = "listens"
        needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, "texts", "associations"})
        settings: ExclamationsConfig
        associations: Any
        texts: Any

        def __call__(self, batch: RewardBatch) -> Tensor:
            raise NotImplementedError

    # Its annotations name a class of this module, and it stands in a function.
    register(Listens)
    found = {term.name: term for term in registered_terms()}["listens"]
    texts: Any = "what tokens say"
    associations: Any = "what goes together"
    made: Any = found.term(ExclamationsConfig(), Resources(texts, associations))
    assert (made.texts, made.associations) == (texts, associations)
    assert Resources(texts, associations).hold(found.needs)
    assert not Resources(texts).hold(found.needs)
    with pytest.raises(ValueError, match="the reward term listens needs associations"):
        found.term(ExclamationsConfig(), Resources(texts))


def test_registering_again_is_no_clash() -> None:
    """As when a module is read anew."""
    register(Exclamations)
    register(Exclamations)
    assert sum(term.name == "exclamations" for term in registered_terms()) == 1


# --- what is refused


class _Named:
    needs: ClassVar[frozenset[str]] = frozenset()
    settings: ExclamationsConfig


def test_a_name_that_is_taken_is_refused() -> None:
    class Mine(_Named):
        name = "coverage"

    with pytest.raises(ConfigError, match=r"two reward terms are called 'coverage' \(cagsr\.reward\.terms\.coverage, "):
        register(Mine)

    class Loud(_Named):
        name = "exclamations"

    register(Exclamations)
    # Of the same module, with the same settings: another class all the same.
    with pytest.raises(ConfigError, match="two reward terms are called 'exclamations'"):
        register(Loud)


@pytest.mark.parametrize("name", ["clip", "functions", "weights", "total", "no name", "", "class", 3])
def test_a_name_that_can_be_no_section_is_refused(name: Any) -> None:
    """Settings of the reward have names too, and so have flags."""
    with pytest.raises(ConfigError, match="reward term"):
        register(type("Mine", (_Named,), {"name": name, "__annotations__": {"settings": ExclamationsConfig}}))


def test_settings_without_a_weight_are_refused() -> None:
    @dataclass(frozen=True)
    class Bare:
        most: int = 3

    for settings in (Bare, int, None):
        annotations = {} if settings is None else {"settings": settings}
        mine: Any = type("Mine", (), {"name": "mine", "needs": frozenset(), "__annotations__": annotations})
        with pytest.raises(ConfigError, match="the settings of the reward term 'mine' have no weight") as caught:
            register(mine)
        assert "derive them from TermConfig" in str(caught.value)
    assert "mine" not in registry._TERMS


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a_package_that_is_not_there.terms", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("json:nothing_of_that_name", "AttributeError: module 'json' has no attribute 'nothing_of_that_name'"),
    ],
)
def test_an_entry_point_that_can_not_be_loaded_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    points = [EntryPoint("theirs", value, registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "cagsr.reward_terms" else [])
    with pytest.raises(ConfigError) as caught:
        registered_terms()
    said = str(caught.value)
    assert said == (f"the reward term 'theirs' of {value} can't be loaded ({words}); mend or uninstall its package")


def test_an_entry_point_s_refusal_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "terms_for_test_without_weight.py").write_text(
        "from cagsr.reward.registry import register\n\n@register\nclass Mine:\n    name = 'mine'\n    needs = ()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("theirs", "terms_for_test_without_weight", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(ConfigError, match=r"'theirs' of terms_for_test_without_weight .*'mine' have no weight"):
        registered_terms()


def test_reserved_are_the_reward_s_own_names() -> None:
    own = {name for name in vars(RewardConfig) if not name.startswith("_")}
    own |= {field.name for field in dataclasses.fields(RewardConfig)} - {term.name for term in TERMS}
    assert own | {"total"} == registry.RESERVED


# --- another package's, from its entry point to a score


THEIRS = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from cagsr.flow import RewardBatch
from cagsr.reward.registry import TermConfig, register


@dataclass(frozen=True)
class CatsConfig(TermConfig):
    \"\"\"Cats: how many cats an answer has.\"\"\"

    most: Annotated[int, Ge(1)] = 9
    \"\"\"More cats than these count no more.\"\"\"


@register
@dataclass(frozen=True)
class Cats:
    name: ClassVar = "cats"
    needs: ClassVar = frozenset()
    settings: CatsConfig

    def __call__(self, batch: RewardBatch) -> torch.Tensor:
        counts = [text.split().count("cat") for text in batch.episodes.completions]
        return torch.tensor(counts).clamp(max=self.settings.most)
"""


def installed(folder: Path, point: str) -> dict[str, str]:
    """A package with an entry point, as pip leaves it, and the environment of a process that finds it."""
    about = folder / "cats_for_test-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cats-for-test\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[cagsr.reward_terms]\ncats = {point}\n")
    (folder / "cats_for_test.py").write_text(THEIRS)
    source = Path(registry.__file__).parents[2]
    return {"PYTHONPATH": f"{folder}:{source}"}


def test_another_package_s_term_has_a_section(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site", "cats_for_test:Cats")
    tiny.save_model(tmp_path / "start")
    rows = [{"prompt": "tell me about the cat", "completion": text} for text in ("a cat", "cat cat cat", "a dog")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "more.yaml").write_text("reward:\n  cats:\n    most: 2\n")
    line = ["score", "--model", tmp_path / "start", "--data", tmp_path / "pairs.jsonl", "--reward.cats.weight", "0.5"]
    line += ["--config", tmp_path / "more.yaml", "--output", tmp_path / "scores.jsonl"]
    apart.finish(apart.python("-m", "cagsr.commands.main", *line, environment=environment))
    scored = [json.loads(row) for row in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["terms"]["cats"] for row in scored] == [1.0, 2.0, 0.0]
    assert all("cats" in row["contributions"] for row in scored)


def test_another_package_s_settings_are_held_to_their_types(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site", "cats_for_test:Cats")
    with apart.python(
        "-m", "cagsr.commands.main", "score", "--reward.cats.most", "0", environment=environment
    ) as process:
        assert process.wait() == 2
        assert "--reward.cats.most 0: must be 1 or more" in process.said
        assert "Traceback" not in process.said


def test_a_package_that_is_broken_is_one_sentence_on_the_command_line(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site", "cats_for_test:Dogs")
    with apart.python("-m", "cagsr.commands.main", "train", "--help", environment=environment) as process:
        assert process.wait() == 2
        assert process.said.startswith(
            "cagsr train: error: the reward term 'cats' of cats_for_test:Dogs can't be loaded"
        )
        assert "Traceback" not in process.said


# --- those that come with the package


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_registers_one_term(path: Path) -> None:
    """Named as the file is; with settings and, where it needs something, that alone that there is."""
    module = f"{terms.__name__}.{path.stem}"
    own = [term for term in TERMS if term.build.__module__ == module]
    assert [term.name for term in own] == [path.stem]
    assert own[0].config.__module__ == module
    assert own[0].needs <= RESOURCES | {ATTENTION, REFERENCE, SUPPORT}
    decorated = [
        one.name
        for one in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(one, ast.ClassDef) and any(ast.unparse(line) == "register" for line in one.decorator_list)
    ]
    assert decorated == [own[0].build.__name__]
    # Its attention would be missed only where it is read: what it names is what it says.
    code = path.read_text(encoding="utf-8")
    assert ("batch.attention" in code) == (ATTENTION in own[0].needs)
    assert ("readings.support" in code) == (SUPPORT in own[0].needs)
    assert all((f"self.{name}" in code) == (name in own[0].needs) for name in RESOURCES)


def test_places_are_numbered_and_the_settings_have_a_section_for_each() -> None:
    assert [term.place for term in TERMS] == list(range(1, len(FILES) + 1))
    sections = {field.name: field for field in dataclasses.fields(RewardConfig)}
    assert [name for name in sections if hasattr(getattr(RewardConfig(), name), "weight")] == [
        term.name for term in TERMS
    ]
    for term in TERMS:
        assert getattr(RewardConfig(), term.name) == term.config()
        assert term.config.__doc__
    assert RewardConfig().weights() == {term.name: term.config().weight for term in TERMS}


def test_what_a_reward_needs_is_what_its_terms_need() -> None:
    off = {term.name: term.config(weight=0.0) for term in TERMS}
    for term in TERMS:
        config = RewardConfig(**(off | {term.name: term.config(weight=-0.1)}))
        for what in {ATTENTION, *RESOURCES}:
            assert config.needs(what) == (what in term.needs), (term.name, what)


def test_the_table_of_terms_in_the_documents_is_the_registry() -> None:
    """docs/reward.md: name, what it is, what it needs, default weight."""
    text = (ROOT / "docs" / "reward.md").read_text(encoding="utf-8")
    head, _, *lines = text[text.index("| term |") :].split("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    rows = [dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
    shown = {}
    for row in rows:
        weight = re.match(r"weight (-?[\d.]+)", row["settings"])
        assert weight is not None, row
        needs = frozenset() if row["needs"] == "–" else frozenset(row["needs"].split(", "))
        shown[row["term"].strip("`")] = (row["what it is"], needs, float(weight[1]))
    assert shown == {
        term.name: ((term.config.__doc__ or "").rstrip("."), term.needs, term.config().weight) for term in TERMS
    }
    assert all(needs_of(term.build) == term.needs for term in TERMS)
