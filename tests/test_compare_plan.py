"""Plans: what is read, what is refused in one sentence, and which jobs follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cagsr.compare.jobs import plan_jobs
from cagsr.compare.plan import read_plan
from cagsr.compare.worker import human_labels
from cagsr.errors import ConfigError


def tree(tmp_path: Path) -> dict[str, Any]:
    config = tmp_path / "train.yaml"
    config.write_text("run: {steps: 2}\n")
    return {
        "title": "A comparison",
        "work": str(tmp_path / "work"),
        "start": "make {output} {seed}",
        "files": {"train": "{work}/train.jsonl", "held_out": "h.jsonl", "test": "t.jsonl"},
        "configs": [str(config)],
        "seeds": [3, 5],
        "reward_models": {"people": {"data": "prefs.jsonl", "num_pairs": 50, "human": True}},
        "methods": {
            "later": {"after": "ours", "reward_model": "people"},
            "ours": {},
            "pairs": {"kind": "dpo", "reward_model": "people", "seeds": 1},
        },
        "fast": {"seeds": [3], "set": {"run.steps": 1}, "methods": ["ours"]},
    }


def written(tmp_path: Path, content: dict[str, Any] | str) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_jobs_follow_what_they_need(tmp_path: Path):
    plan = read_plan(written(tmp_path, tree(tmp_path)))
    jobs = {job.name: job for job in plan_jobs(plan)}
    assert set(jobs) == {
        *(f"start-seed{seed}" for seed in (3, 5)),
        *(f"method-{name}-seed{seed}" for name in ("start", "ours", "later") for seed in (3, 5)),
        "method-pairs-seed3",
        *(f"reward_model-people-seed{seed}" for seed in (3, 5)),
    }
    assert jobs["method-later-seed5"].needs == ("start-seed5", "reward_model-people-seed5", "method-ours-seed5")
    order = list(jobs)
    for job in jobs.values():
        assert all(order.index(need) < order.index(job.name) for need in job.needs)
    # 50 pairs by people, used by the method after ours as well
    assert human_labels(plan, jobs["method-ours-seed3"]) == 0
    assert human_labels(plan, jobs["method-later-seed3"]) == 50
    assert human_labels(plan, jobs["method-pairs-seed3"]) == 50


def prints(tmp_path: Path, content: dict[str, Any]) -> dict[str, str]:
    return {job.name: job.fingerprint for job in plan_jobs(read_plan(written(tmp_path, content)))}


def test_only_what_a_change_touches_is_done_again(tmp_path: Path):
    content = tree(tmp_path)
    before = prints(tmp_path, content)
    assert prints(tmp_path, content) == before
    content["methods"]["ours"]["set"] = {"ppo.kl_coef": 0.1}
    changed = {name for name, value in prints(tmp_path, content).items() if value != before[name]}
    # the method itself, and the one that starts from its models
    assert changed == {f"method-{name}-seed{seed}" for name in ("ours", "later") for seed in (3, 5)}
    content = tree(tmp_path)
    content["methods"]["ours"]["label"] = "Ours"
    content["seeds"] = [3, 5, 7]
    after = prints(tmp_path, content)
    assert {name: after[name] for name in before} == before
    content = tree(tmp_path)
    (tmp_path / "train.yaml").write_text("run: {steps: 3}\n")
    same = {name for name, value in prints(tmp_path, content).items() if value == before[name]}
    assert same == {name for name in before if not name.startswith("method")}


def test_judging_otherwise_trains_nothing_again(tmp_path: Path):
    content = tree(tmp_path)
    before = {job.name: job for job in plan_jobs(read_plan(written(tmp_path, content)))}
    content["files"]["test"] = "other.jsonl"
    content["results"] = "elsewhere"
    plan = read_plan(written(tmp_path, content))
    for job in plan_jobs(plan):
        assert job.training == before[job.name].training
        assert (job.fingerprint != before[job.name].fingerprint) == (job.kind == "method")
        assert ("elsewhere" in str(job.done_file(plan))) == (job.kind == "method")


def test_jobs_remember_what_they_were_done_with(tmp_path: Path):
    content = tree(tmp_path)
    plan = read_plan(written(tmp_path, content))
    job = next(job for job in plan_jobs(plan) if job.name == "method-ours-seed3")
    assert not job.is_done(plan)
    job.mark_done(plan, seconds=1.0)
    assert job.is_done(plan)
    content["methods"]["ours"]["set"] = {"ppo.kl_coef": 0.1}
    changed = {one.name: one for one in plan_jobs(read_plan(written(tmp_path, content)))}
    assert not changed[job.name].is_done(plan)
    job.done_file(plan).write_text("half a li")
    assert not job.is_done(plan)


def test_fast_is_a_plan_of_its_own(tmp_path: Path):
    file = written(tmp_path, tree(tmp_path))
    plan = read_plan(file, fast=True)
    assert (plan.seeds, list(plan.methods), plan.set) == ([3], ["ours"], {"run.steps": 1})
    assert plan.work == str(tmp_path / "work") + "-fast"
    assert read_plan(file).work == str(tmp_path / "work")


def change(content: dict[str, Any], where: str, value: Any) -> None:
    *path, last = where.split("/")
    for key in path:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        ("titel", "x", "unknown key 'titel'; did you mean 'title'"),
        ("methods/ours", {"afer": "later"}, "did you mean 'after'"),
        ("title", ..., "'title' is missing"),
        ("seeds", [], "at least one seed"),
        ("seeds", [1, 1], "each once"),
        ("methods/later/after", "our", "unknown method 'our'; did you mean 'ours'"),
        ("methods/later/reward_model", "peple", "unknown reward model 'peple'; did you mean 'people'"),
        ("methods/ours", {"after": "later"}, "comes back to itself"),
        ("methods/ours", {"seeds": 1}, "needs more seeds than 'ours'"),
        ("methods/pairs", {"kind": "dpo"}, "dpo needs the reward_model"),
        ("methods/pairs", {"kind": "ppo"}, "methods.pairs.kind"),
        ("methods/start", {}, "that name is the supervised start's"),
        ("contrasts", [["ours"]], "must be two methods"),
        ("contrasts", [["ours", "theirs"]], "unknown method 'theirs'"),
        ("methods/without", {"group": "ablation"}, "ablations need 'base'"),
        ("configs", ["nowhere.yaml"], "nowhere.yaml"),
        ("methods", {"pairs": {"kind": "dpo", "reward_model": "people"}}, "of the kind train or best_of_n"),
        ("methods", {}, "of the kind train or best_of_n"),
        ("base", "pairs", "'pairs' has no settings of cagsr train"),
        ("validity", {"prompts": 4}, "must name at least one truth"),
        ("methods/best", {"kind": "best_of_n", "after": "ours"}, "it comes after nothing"),
        ("methods", {"best": {"kind": "best_of_n"}, "ours": {"after": "best"}}, "trains no model to start from"),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(tmp_path: Path, where: str, value: Any, sentence: str):
    content = tree(tmp_path)
    change(content, where, value)
    with pytest.raises(ConfigError, match=sentence.replace("(", "\\(")) as refused:
        plan_jobs(read_plan(written(tmp_path, content)))
    assert "\n" not in str(refused.value)


def test_files_that_are_no_plans(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: can't be read"):
        read_plan(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="line 2: not valid YAML"):
        read_plan(written(tmp_path, "title: x\n: [\n"))
    with pytest.raises(ConfigError, match="should hold the plan"):
        read_plan(written(tmp_path, "- a\n"))
    content = tree(tmp_path)
    del content["fast"]
    with pytest.raises(ConfigError, match="no section 'fast'"):
        read_plan(written(tmp_path, content), fast=True)
    for wrong, sentence in ((True, "'fast' must hold keys"), ({"methods": True}, "'fast.methods' must list")):
        content["fast"] = wrong
        with pytest.raises(ConfigError, match=sentence):
            read_plan(written(tmp_path, content), fast=True)
    content["fast"] = {"methods": ["our"]}
    with pytest.raises(ConfigError, match="unknown method 'our'; did you mean 'ours'"):
        read_plan(written(tmp_path, content), fast=True)


def test_variables_are_filled_in_everywhere(tmp_path: Path):
    content = tree(tmp_path)
    content["variables"] = {"model": None, "judge": None}
    content["start"] = "make {model} {output}"
    content["judges"] = {"embedding_model": "{judge}"}
    content["methods"]["ours"] = {"set": {"reward.models": ["{model}/reward"]}}
    file = written(tmp_path, content)
    plan = read_plan(file, variables=["model=a=b"])
    assert plan.start == "make a=b {output}"
    assert plan.methods["ours"].set == {"reward.models": ["a=b/reward"]}
    assert plan.judges.embedding_model is None  # nothing but a variable that nobody gave
    assert read_plan(file, variables=["model=m", "judge=j"]).judges.embedding_model == "j"
    # another model is another start, and so are the policies
    one, other = (
        {job.name: job.training for job in plan_jobs(read_plan(file, variables=[f"model={name}"]))} for name in "mn"
    )
    assert not set(one.values()) & set(other.values())
    for given, sentence in (
        ([], "needs a value for 'model'; give it as --variables model=VALUE"),
        (["model"], "write NAME=VALUE"),
        (["modle=m"], "has no variable 'modle'; did you mean 'model'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            read_plan(file, variables=given)
    content["variables"] = {"seed": "1"}
    with pytest.raises(ConfigError, match="commands are filled in with that name"):
        read_plan(written(tmp_path, content))
