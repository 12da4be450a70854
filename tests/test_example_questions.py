"""The plans of the example read, and the prompts unlike those of the training are what they say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from examples.e2e import cross_attention, elsewhere, rewards
from examples.e2e.facts import as_prompt, parse
from transformers import AutoModelForSeq2SeqLM

import tiny
from cagsr.compare.jobs import plan_jobs
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import read_plan
from cagsr.errors import DataError
from cagsr.reward.settings import TERMS

ROOT = Path(__file__).parent.parent
PLANS = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if "\nmethods:" in path.read_text(encoding="utf-8"))
PROMPT = "name: Tefos | eatType: hotel | food: Korean | area: riverside | familyFriendly: yes =>"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    variables = [f"{name}=x" for name, value in tree.get("variables", {}).items() if value is None]
    for fast in (False, True) if "fast" in tree else (False,):
        plan = read_plan(path, fast=fast, variables=variables)
        assert len(plan_jobs(plan)) > len(plan.methods)
        for name, method in plan.methods.items():
            if method.kind != "dpo":
                # Every setting of every method exists and has the right type; what is trained on is never judged on.
                reward_settings(plan, name, plan.seeds[0])
        assert len({plan.files.train, plan.files.held_out, plan.files.test}) == 3


@pytest.mark.parametrize(
    "path", [path for path in PLANS if "variables:" in path.read_text()], ids=lambda path: path.stem
)
def test_controls_of_a_pretrained_model_have_their_reward_alone(path: Path, monkeypatch: pytest.MonkeyPatch):
    """What CAGSR's reward weighs must not leak into the ceiling, the floor and the attention's or the certainty's own."""
    monkeypatch.chdir(ROOT)
    plan = read_plan(path, variables=["model=x"])
    alone = {
        "oracle": set(),
        "reference": set(),
        "random": set(),
        "certainty": {"self_certainty"},
        "attention": {"coverage", "grounded_coverage", "repetition"},
    }
    for name in plan.methods:
        reward = reward_settings(plan, name, 0).reward
        weighed = {term.name for term in TERMS if getattr(reward, term.name).weight}
        assert bool(reward.functions) == (name in ("oracle", "reference", "random"))
        if name in alone:
            assert weighed == alone[name]
        assert reward_settings(plan, name, 0).lora.r == 16


def test_the_ceiling_judges_what_the_paper_trains(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    trained = {job.name: job.training for job in plan_jobs(read_plan(ROOT / "examples/e2e/paper.yaml"))}
    for name in ("ceiling", "questions/domain", "questions/combinations", "questions/hostile-sink"):
        jobs = plan_jobs(read_plan(ROOT / f"examples/e2e/{name}.yaml"))
        assert all(trained[job.name] == job.training for job in jobs if job.kind != "validity")


def test_no_method_of_the_paper_sees_a_test_prompt_as_training_data(monkeypatch: pytest.MonkeyPatch):
    """The files of the plan; that their contents are disjoint is tests/test_preferences_e2e.py."""
    monkeypatch.chdir(ROOT)
    plan = read_plan(ROOT / "examples/e2e/paper.yaml")
    trained_on = {plan.files.train, *(model.data for model in plan.reward_models.values())}
    assert plan.files.test not in trained_on
    assert {Path(name).name for name in trained_on} == {"unlabelled.jsonl", "synthetic.jsonl", "human.train.jsonl"}


def test_planted_text_leaves_the_facts_alone():
    row = elsewhere.plant("name: Tefos | area: riverside =>", before="noise", after="word word")
    assert row == {
        "prompt": "noise | name: Tefos | area: riverside | word word =>",
        "facts": "name: Tefos | area: riverside =>",
    }
    said = [" Tefos is by the riverside. word word"]
    assert elsewhere.hits([row["prompt"]], said, facts=[row["facts"]]) == [1.0]
    assert elsewhere.added([row["prompt"]], [" Tefos is a cheap pub by the riverside."], facts=[row["facts"]]) == [1.0]


def test_values_of_another_domain_count_literally():
    report = elsewhere.report(["x"], [" Tefos is a family friendly hotel by the riverside."], facts=[PROMPT])
    assert report == [{"missed": pytest.approx(0.2), "added": 0.0}]  # Korean is missing, one fact of five
    wrong = elsewhere.report(["x"], [" Tefos is a family friendly Italian hotel by the riverside."], facts=[PROMPT])
    assert wrong == [{"missed": pytest.approx(0.2), "added": pytest.approx(0.2)}]


def test_the_other_domain_is_another():
    places = elsewhere.another_domain(50, random.Random(0))
    assert all(3 <= len(facts) <= 6 for facts in places)
    for facts in places:
        assert parse(as_prompt(facts)) == facts
        assert all(value in elsewhere.STAYS[slot] for slot, value in facts if slot in elsewhere.STAYS)


def test_unseen_combinations(tmp_path: Path):
    def write(name: str, prompts: list[str]) -> None:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))

    write("sft", ["name: A | area: riverside =>"])
    write("unlabelled", ["name: B | food: Thai =>"])
    write("test", ["area: city centre | name: C =>", "name: D | food: Thai =>", "name: E | near: F =>"])
    assert elsewhere.unseen_combinations(tmp_path) == [
        {"prompt": "name: E | near: F =>", "facts": "name: E | near: F =>"}
    ]


def test_the_checker_as_a_report():
    prompt = "name: Tefos | area: riverside | food: Italian =>"
    found = rewards.report([prompt], [" Tefos is a cheap Chinese place by the riverside."])
    assert found == [{"missed": pytest.approx(1 / 3), "wrong": pytest.approx(1 / 3), "added": pytest.approx(1 / 3)}]
    assert rewards.added([prompt], [" Tefos serves Italian food by the riverside."]) == [0.0]


def test_the_encoder_decoder_has_the_llama_s_size(tmp_path: Path):
    with pytest.raises(DataError, match="holds no tokenizer; run python -m examples"):
        cross_attention.main(cross_attention.Options(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path / "init")
    cross_attention.main(cross_attention.Options(tmp_path))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "init-cross")
    vocabulary = tiny.tokenizer().vocab_size  # the example's has 1,024 pieces, and its Llama 984,192 parameters
    assert model.num_parameters() + (1024 - vocabulary) * 128 == pytest.approx(984_192, rel=0.01)
    assert model.config.decoder_start_token_id == tiny.tokenizer().bos_token_id
