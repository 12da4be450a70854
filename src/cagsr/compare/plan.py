"""The plan of a comparison: a YAML file as typed dataclasses, with every mistake in one sentence."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cagsr.compare.plan_variables import with_variables
from cagsr.errors import ConfigError
from cagsr.evaluation.judges import Judges
from cagsr.parse import suggestion

START = "start"
"""Name of the method that does nothing: the supervised start."""


@dataclass(frozen=True)
class _Strict:
    """Refuses unknown keys."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Files(_Strict):
    """The prompts. No prompt of ``test`` may be in any file that something is trained on."""

    train: str
    """Unlabelled prompts."""
    held_out: str
    """Prompts to watch a run with; settings are tuned on them."""
    test: str
    """Prompts, with references, that every number of the report is from."""
    test_limit: int | None = None
    """Use only the first so many test prompts."""


@dataclass(frozen=True)
class JudgeFiles(Judges, _Strict):
    """What judges the answers; none of it may be part of a reward (an oracle apart)."""


@dataclass(frozen=True)
class RewardModelPlan(_Strict):
    """A reward model, trained once for each seed from that seed's start."""

    data: str
    """Preference pairs: prompt, chosen, rejected."""
    num_pairs: int | None = None
    """Only so many of them (nested: the 50 are among the 100)."""
    human: bool = False
    """People made the pairs: their number counts as labels."""
    held_out: str | None = None
    """Pairs to measure its accuracy on."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of ``cagsr reward-model``, with dots."""


@dataclass(frozen=True)
class Method(_Strict):
    """One row of the tables."""

    kind: Literal["train", "dpo", "best_of_n"] = "train"
    """train: RL from the start; dpo: TRL's DPO on a reward model's pairs; best_of_n: no training, the best of N by the reward."""
    group: Literal["main", "labels", "ablation", "control"] = "main"
    """Which table it belongs to."""
    label: str = ""
    """How the tables call it; empty: its name."""
    seeds: int | None = None
    """Only the first so many seeds."""
    configs: list[str] = field(default_factory=list)
    """Config files after the plan's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of ``cagsr train`` (of ``cagsr dpo`` for dpo), with dots; they override the files."""
    reward_model: str | None = None
    """A reward model of the plan that joins the reward (dpo: whose pairs are trained on)."""
    reward_model_weight: float = 1.0
    after: str | None = None
    """Start from this method's final model instead of the supervised start."""
    curve: Literal["", "human", "hybrid"] = ""
    """The label curve that it is a point of."""
    num_generations: int = 8
    """best_of_n: N."""


@dataclass(frozen=True)
class Validity(_Strict):
    """How well the reward's terms see the truth, before any training."""

    prompts: int = 96
    """How many prompts, 8 answers each."""
    file: str | None = None
    """Prompts to measure it on; None: ``files.held_out``."""
    seeds: int = 1
    """Starts to measure it on."""
    checkers: dict[str, str] = field(default_factory=dict)
    """Name -> dotted path of a truth; the first ranks answers, higher is better."""
    disagreements: int = 8
    """How many of the worst disagreements between reward and first checker are printed."""


@dataclass(frozen=True)
class Plan(_Strict):
    """A whole comparison."""

    title: str
    work: str
    """Folder for everything it makes; {work} in other values."""
    start: str
    """Command that makes a seed's start model: {python}, {work}, {seed} and {output} are filled in."""
    files: Files
    configs: list[str]
    """Config files of ``cagsr train`` that all methods share."""
    methods: dict[str, Method]
    variables: dict[str, str | None] = field(default_factory=dict)
    """Names of your own for {name} in all other values, as {model: null}; --variables model=DIR gives one its value. null: a
    value that is nothing but the name is left out, and any other use must be given one."""
    prepare: list[str] = field(default_factory=list)
    """Commands that are run once, before everything."""
    prepare_judges: list[str] = field(default_factory=list)
    """Commands that make the judges, run once after those; what is trained does not depend on them."""
    judges: JudgeFiles = field(default_factory=JudgeFiles)
    results: str = "results"
    """Folder of the results below ``work``: plans that share starts and policies, but judge them on other prompts, have
    one each."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each seed has a start model of its own, shared by all methods."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of ``cagsr train`` that override the files, for all methods."""
    reward_models: dict[str, RewardModelPlan] = field(default_factory=dict)
    lower_is_better: list[str] = field(default_factory=list)
    """Measures of which less is better, besides the usual ones."""
    primary: list[str] = field(default_factory=lambda: ["rouge_l"])
    """Measures that are tested; the first one makes the curves and the comparison over training."""
    contrasts: list[list[str]] = field(default_factory=list)
    """Pairs of methods that are compared with each other."""
    base: str = ""
    """Method that the ablations change."""
    validity: Validity | None = None
    findings: str = ""
    """What its author makes of the result, in Markdown: printed first."""
    limits: list[str] = field(default_factory=list)
    """What the numbers do not show; the report adds what it can see itself."""
    fast: dict[str, Any] = field(default_factory=dict)
    """Values that --fast puts in place of the plan's; methods: a list of those it keeps."""

    @property
    def folder(self) -> Path:
        """The work folder."""
        return Path(self.work)

    @property
    def results_folder(self) -> Path:
        """Where the numbers go."""
        return self.folder / self.results

    def result_file(self, method: str, seed: int) -> Path:
        """Where a judged method leaves its numbers; those of ``validity`` are the measurement of a seed's start."""
        return self.results_folder / f"{method}-seed{seed}.json"

    def start_folder(self, seed: int) -> Path:
        """The supervised start of a seed."""
        return self.folder / f"start-seed{seed}"

    def reward_model_folder(self, name: str, seed: int) -> Path:
        """A trained reward model."""
        return self.folder / "reward-models" / f"{name}-seed{seed}"

    def method_folder(self, name: str, seed: int) -> Path:
        """The run folder of a method."""
        return self.folder / "methods" / f"{name}-seed{seed}"

    def model_folder(self, name: str, seed: int) -> Path:
        """Where a method leaves its model: a run its final one, DPO its whole folder."""
        if name == START:
            return self.start_folder(seed)
        folder = self.method_folder(name, seed)
        return folder if self.methods[name].kind == "dpo" else folder / "final"

    def fill(self, text: str, **more: object) -> str:
        """Fill {work} and other names in a value of the plan."""
        for name, value in {"work": self.work, **more}.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text

    def seeds_of(self, name: str) -> list[int]:
        """The seeds a method is run with."""
        count = None if name == START else self.methods[name].seeds
        return self.seeds[:count]

    @property
    def settings_method(self) -> str:
        """The method with whose settings the start and DPO are judged: the base, else the first that trains by a reward."""
        kinds = {name: method.kind for name, method in self.methods.items()}
        found = [name for kind in ("train", "best_of_n") for name in kinds if kinds[name] == kind]
        return self.base or found[0]

    def label(self, name: str) -> str:
        """How the tables call a method."""
        return "no RL (start)" if name == START else self.methods[name].label or name


def read_plan(path: Path, *, fast: bool = False, variables: Sequence[str] = ()) -> Plan:
    """Read a plan; ``fast`` puts the values of its ``fast`` section in place, and ``-fast`` at the work folder's end.

    ``variables`` are values for the plan's, as ``NAME=VALUE``. Raises ConfigError: no such file, malformed YAML, an unknown key,
    a wrong value, a name that the plan lacks.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read; give the YAML file of a comparison.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"{path}{f' line {mark.line + 1}' if mark else ''}: not valid YAML; correct that line."
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: should hold the plan of a comparison, 'key: value' lines.")
    if fast:
        if not tree.get("fast"):
            raise ConfigError(f"{path}: has no section 'fast', so --fast has nothing to put in place.")
        tree = _fast(path, tree)
    tree = with_variables(path, tree, variables)
    try:
        plan = TypeAdapter(Plan).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    for problem in _problems(plan):
        raise ConfigError(f"{path}: {problem}")
    return plan


def _fast(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(tree["fast"], dict):
        raise ConfigError(
            f"{path}: 'fast' must hold keys of the plan with their small values (it is {tree['fast']!r})."
        )
    overlay = dict(tree["fast"])
    kept = overlay.pop("methods", None)
    if kept is not None and not isinstance(kept, list):
        raise ConfigError(f"{path}: 'fast.methods' must list the methods that it keeps (it is {kept!r}).")
    merged = _merge(tree, {"work": f"{tree.get('work', 'runs/compare')}-fast", **overlay})
    if kept is not None:
        methods = tree.get("methods") or {}
        for name in kept:
            if name not in methods:
                raise ConfigError(f"{path}: fast.methods: unknown method '{name}'{suggestion(name, list(methods))}")
        merged["methods"] = {name: methods[name] for name in kept}
        merged["contrasts"] = [pair for pair in tree.get("contrasts") or [] if set(pair) <= {*kept, START}]
    return merged


def _merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        # Settings with dots replace each other one by one as well.
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        known = {field.name for kind in _Strict.__subclasses__() for field in dataclasses.fields(kind)}
        return f"unknown key '{where}'{suggestion(str(problem['loc'][-1]), sorted(known))}"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {problem['msg']} (it is {problem['input']!r})"


def _problems(plan: Plan) -> Iterator[str]:
    """Names that refer to nothing or to the wrong thing, and values out of range, each in one sentence."""
    methods = plan.methods
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        yield "'seeds' must list at least one seed, each once."
    if START in methods:
        yield f"'methods.{START}': that name is the supervised start's; choose another."
    references = {
        f"methods.{name}.after": [method.after] for name, method in methods.items() if method.after is not None
    }
    references |= {"contrasts": [name for pair in plan.contrasts for name in pair], "base": [plan.base or START]}
    for where, names in references.items():
        for name in names:
            if name != START and name not in methods:
                yield f"'{where}': unknown method '{name}'{suggestion(str(name), list(methods))}"
    for name, method in methods.items():
        if method.reward_model is not None and method.reward_model not in plan.reward_models:
            hint = suggestion(method.reward_model, list(plan.reward_models))
            yield f"'methods.{name}.reward_model': unknown reward model '{method.reward_model}'{hint}"
        if method.kind == "dpo" and method.reward_model is None:
            yield f"'methods.{name}': dpo needs the reward_model whose pairs it is trained on."
        yield from _after_problems(plan, name)
    for pair in plan.contrasts:
        if len(pair) != 2:
            yield f"'contrasts': {pair} must be two methods."
    if plan.base:
        if plan.base == START or methods[plan.base].kind == "dpo":
            yield f"'base': '{plan.base}' has no settings of cagsr train; name a method that has."
    elif all(method.kind == "dpo" for method in methods.values()):
        why = "its sampling is what the start and DPO are judged with"
        yield f"'methods' must hold one of the kind train or best_of_n: {why}."
    if plan.validity is not None and not plan.validity.checkers:
        yield "'validity.checkers' must name at least one truth, as {quality: my_checks.quality}."
    if any(method.group == "ablation" for method in methods.values()) and not plan.base:
        yield "ablations need 'base', the method that they change."


def _after_problems(plan: Plan, name: str) -> Iterator[str]:
    """What is wrong with the method that a method starts from: it must have a policy of its own, with the same seeds."""
    after = plan.methods[name].after
    if after is None:
        return
    if after != START and plan.methods[name].kind == "best_of_n":
        why = "best_of_n picks among the start's answers, so it comes after nothing"
        yield f"'methods.{name}.after': {why}; leave 'after' out."
    if after != START and plan.methods[after].kind == "best_of_n":
        yield (f"'methods.{name}.after': '{after}' is best_of_n, which trains no model to start from; name another.")
    seen = [name]
    while after is not None and after != START:
        if after in seen:
            yield f"'methods.{name}.after' comes back to itself; break the circle."
            return
        seen.append(after)
        after = plan.methods[after].after
    after = str(plan.methods[name].after)
    if set(plan.seeds_of(name)) - set(plan.seeds_of(after)):
        yield f"'methods.{name}' needs more seeds than '{after}', which it starts from, has."
