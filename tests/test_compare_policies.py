"""What a comparison makes is made again when what it depends on changes, whatever a kill left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cagsr.compare.jobs import Job, contents, plan_jobs
from cagsr.compare.judge_policy import _base_config
from cagsr.compare.make_models import make_policy, make_start
from cagsr.compare.plan import START, Files, Method, Plan, RewardModelPlan
from cagsr.compare.results import Results
from cagsr.errors import ConfigError

MAKE = (
    "{python} -c \"import pathlib, sys; f = pathlib.Path('{output}'); f.mkdir(parents=True, exist_ok=True); "
    "(f / 'config.json').write_text('SAID'); (f / 'model.safetensors').touch(); sys.exit(STATUS)\""
)


def plan_of(tmp_path: Path, methods: dict[str, Method] | None = None, *, said: str = "first", status: int = 0) -> Plan:
    return Plan(
        title="t",
        work=str(tmp_path / "work"),
        start=MAKE.replace("SAID", said).replace("STATUS", str(status)),
        files=Files("train.jsonl", "held_out.jsonl", "test.jsonl"),
        configs=[],
        methods=methods or {"ours": Method()},
        seeds=[0],
        reward_models={"people": RewardModelPlan(data="pairs.jsonl")},
    )


def job_of(plan: Plan, name: str) -> Job:
    return next(job for job in plan_jobs(plan) if job.name == name)


def start_of(plan: Plan) -> str:
    make_start(plan, job_of(plan, "start-seed0"))
    return (plan.start_folder(0) / "config.json").read_text()


def test_another_start_command_is_run_and_the_same_one_is_not(tmp_path: Path) -> None:
    assert start_of(plan_of(tmp_path)) == "first"
    assert start_of(plan_of(tmp_path, said="second")) == "second"
    (tmp_path / "work" / "start-seed0" / "config.json").write_text("mine")
    assert start_of(plan_of(tmp_path, said="second")) == "mine"


def test_a_start_that_did_not_end_well_is_no_start(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="failed"):
            start_of(plan_of(tmp_path, status=1))
    # killed before the weights were there
    folder = tmp_path / "work" / "start-seed0"
    assert start_of(plan_of(tmp_path)) == "first"
    (folder / "config.json").write_text("half")
    (folder / "model.safetensors").unlink()
    assert start_of(plan_of(tmp_path)) == "first"


def test_starts_of_older_comparisons_are_kept(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, status=1)
    folder = plan.start_folder(0)
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("old")
    assert start_of(plan) == "old"
    assert start_of(plan_of(tmp_path, said="new")) == "new"  # from now on there is a record

    # An older comparison says with what it was done.
    older = plan_of(tmp_path / "done")
    assert start_of(older) == "first"
    job_of(older, "start-seed0").mark_done(older)
    (older.folder / "begun" / "start-seed0.txt").unlink()
    assert start_of(plan_of(tmp_path / "done", said="new")) == "new"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings of each training, which only leaves a file."""
    configs: list[Any] = []

    def train(config: Any, console: Any) -> None:
        configs.append(config)
        final = Path(config.output_dir) / "final"
        final.mkdir(parents=True)
        (final / "config.json").write_text("{}")

    monkeypatch.setattr("cagsr.train.train", train)
    return configs


def test_a_kill_before_the_folder_is_opened_makes_no_old_policy_new(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path)
    job = job_of(plan, "method-ours-seed0")
    model = make_policy(plan, job)
    assert make_policy(plan, job) == model
    assert len(trained) == 1
    changed = plan_of(tmp_path, {"ours": Method(set={"ppo.kl_coef": 0.5})})
    job = job_of(changed, "method-ours-seed0")

    def killed(config: Any, console: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cagsr.train.train", killed)
        with pytest.raises(KeyboardInterrupt):
            make_policy(changed, job)
    assert make_policy(changed, job) == model
    assert [config.ppo.kl_coef for config in trained] == [0.05, 0.5]


def test_settings_that_are_refused_cost_no_policy(tmp_path: Path, trained: list[Any]) -> None:
    plan = plan_of(tmp_path)
    model = make_policy(plan, job_of(plan, "method-ours-seed0"))
    for wrong in ({"ppo.learning_rate": -1.0}, {"ppo.learning_rat": 1.0}):
        changed = plan_of(tmp_path, {"ours": Method(set=wrong)})
        with pytest.raises(ConfigError):
            make_policy(changed, job_of(changed, "method-ours-seed0"))
    assert (model / "config.json").exists()


def test_a_method_may_change_its_kind_and_come_after_dpo(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[Any] = []

    def train_dpo(config: Any) -> Path:
        assert not (Path(config.output_dir) / "final").exists()
        tuned.append(config)
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        return folder

    monkeypatch.setattr("cagsr.preferences.dpo.train_dpo", train_dpo)
    for kind in ("train", "dpo", "train"):
        methods = {
            "ours": Method(kind=kind, reward_model="people"),  # type: ignore[arg-type]
            "later": Method(after="ours"),
            "pairs": Method(kind="dpo", reward_model="people", after="ours"),
        }
        plan = plan_of(tmp_path, methods)
        models = {name: make_policy(plan, job_of(plan, f"method-{name}-seed0")) for name in methods}
        assert all((model / "config.json").exists() for model in models.values())
        assert trained[-1].model.path == tuned[-1].model.path == str(models["ours"])
    assert [Path(config.output_dir).name for config in tuned].count("ours-seed0") == 1


def test_best_of_n_alone_says_how_the_start_is_sampled_and_costs_no_training(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"best": Method(kind="best_of_n", set={"sampling.temperature": 0.5})})
    assert _base_config(plan, START, 0).sampling.temperature == 0.5
    run = plan.method_folder("best", 0)  # of the time when it was trained
    run.mkdir(parents=True)
    (run / "timings.jsonl").write_text('{"step": 1, "collect_seconds": 9.0, "update_seconds": 9.0}\n')
    assert Results(plan, [])._trained("best", 0) == {}


def test_other_prompts_under_the_same_name_make_another_policy(tmp_path: Path, trained: list[Any]) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out", "test", "pairs")}
    for file in files.values():
        file.write_text("one\n")
    plan = dataclasses.replace(
        plan_of(tmp_path, {"ours": Method(), "after": Method(after="ours")}),
        files=Files(*(str(files[name]) for name in ("train", "held_out", "test"))),
    )

    def do(name: str) -> None:
        job = job_of(plan, name)
        inputs = contents([*job.reads, *job.judged_on])
        make_policy(plan, job)
        job.mark_done(plan, inputs=inputs)

    def done() -> dict[str, bool]:
        return {name: job_of(plan, name).is_done(plan) for name in names}

    names = ("method-ours-seed0", "method-after-seed0")
    for name in names:
        do(name)
    assert (done(), len(trained)) == (dict.fromkeys(names, True), 2)
    files["test"].write_text("two\n")  # judged anew, not trained anew
    assert done() == dict.fromkeys(names, False)
    for name in names:
        do(name)
    assert (done(), len(trained)) == (dict.fromkeys(names, True), 2)
    files["train"].write_text("two\n")
    assert done() == dict.fromkeys(names, False)
    for name in names:
        do(name)
    assert (done(), len(trained)) == (dict.fromkeys(names, True), 4)
    files["train"].unlink()  # what is gone can't be compared
    assert done() == dict.fromkeys(names, True)


def test_work_of_older_comparisons_without_hashes_is_kept(tmp_path: Path, trained: list[Any]) -> None:
    plan = plan_of(tmp_path)
    job = job_of(plan, "method-ours-seed0")
    make_policy(plan, job)
    (plan.folder / "begun" / f"{job.name}.txt").write_text(job.training)
    make_policy(plan, job)
    assert len(trained) == 1
    job.mark_done(plan)
    assert job.is_done(plan)
